"""Files that ``weights`` and ``report`` write, and the extras that they need for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prm.files import atomic_write
from recipes.run.files import check_new_file


@contextmanager
def new_output(
    flag: str,
    name: str,
    *,
    overwrite: bool,
    inputs: Sequence[Path] = (),
    beside: Sequence[Path] = (),
) -> Iterator[Path]:
    """Yield a temporary name for a file, which gets its own when the body has written it.

    Args:
        flag: The option that names it, for messages.
        name: The file.
        overwrite: Whether an existing file, and what is ``beside`` it, is replaced.
        inputs: Files that are read, which are never replaced.
        beside: Files and folders that are written with it.

    Raises:
        OptionError: The file exists, is a folder, or is one of ``inputs``; or what is ``beside`` it
            exists.
        OSError: It cannot be written. An older file is unchanged.
    """
    path = Path(name)
    check_new_file(flag, path, overwrite=overwrite, inputs=inputs, beside=beside)
    with atomic_write(path) as unfinished:
        yield unfinished


def pyarrow_for(what: str) -> Any:
    """Return the module ``pyarrow``.

    Raises:
        ModuleNotFoundError: It is not installed; the message names the extra.
    """
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{what} is written by pyarrow, which is not installed: "
            "pip install 'bilevel-prm[datasets]'"
        ) from error
    return pyarrow
