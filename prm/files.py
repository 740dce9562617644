"""Files and folders that appear under their names only when they are complete.

One way of writing for the whole package: everything goes to a temporary name beside the target
(``.NAME.PID.unfinished``), is flushed to the disk, and is then renamed. A writer that fails, or is
killed, leaves what stood under the name as it was.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary name for a file or a folder, which is renamed to ``path`` at the end.

    The body of the ``with`` statement writes a file, or makes a folder and fills it, under the name
    that it is given. What it wrote is flushed to the disk (each file of a folder), renamed, and the
    rename is flushed, too. If the body raises, what it wrote is removed.

    Args:
        path: The target. A file is replaced; a folder must be empty or not exist.

    Yields:
        The temporary name, in the folder of ``path``.

    Raises:
        OSError: The target is a folder that is not empty, or the disk refuses.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        if unfinished.is_dir():
            for inside in sorted(unfinished.rglob("*")):
                _flush(inside)
        _flush(unfinished)
        os.replace(unfinished, path)
        _flush(path.parent)
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            unfinished.unlink(missing_ok=True)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a UTF-8 file of ``lines`` (each with its line break), or leave ``path`` as it was."""
    with (
        atomic_write(path) as unfinished,
        unfinished.open("w", encoding="utf-8", newline="\n") as file,
    ):
        file.writelines(lines)


def _flush(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    is_folder = path.is_dir()
    if is_folder and os.name != "posix":
        return  # elsewhere a folder cannot be opened
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
