"""Write files and directories atomically, and check the outputs of a command before its work.

Everything is written by ``prm.files.atomic_write``: under a temporary name that nobody else has,
which is renamed when all of it is on the disk.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prm.digests import digest_path, write_digest
from prm.files import UNFINISHED, atomic_write, real_target
from recipes.bad_rows import skipped_path, truncated_path
from recipes.options.base import LoaderOptions, ReadOptions
from recipes.options.values import OptionError
from recipes.run.errors import WriteError
from recipes.terminal import say, write_bytes

EXTREMES = "extreme_weights.jsonl"
"""Step scores of examples of highest and lowest weight (``recipes.train.reports.extremes``)."""
LABELS = "labels.jsonl"
"""Given and learned labels of a run that learns labels (``recipes.train.reports.labels``)."""
STANDARD_OUTPUT = "-"
_OTHER_KINDS = frozenset(
    (
        *(".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz", ".parquet", ".arrow"),
        *(".feather", ".csv", ".tsv", ".xls", ".xlsx", ".yaml", ".yml", ".pkl", ".pt", ".npz"),
        *(".safetensors", ".db", ".sqlite"),
    )
)
"""What names of files end with that are no text of JSON."""
"""The name of standard output in an option that names a file to write."""


def write_text(path: Path, text: str) -> None:
    """Write a file, and create its directory if it does not exist.

    Args:
        path: The file, replaced if it exists.
        text: The content, written as UTF-8.

    Raises:
        OSError: The file cannot be written. An older file is unchanged.
    """
    with atomic_write(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, content: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write indented JSON by ``write_text``.

    Raises:
        ValueError: The content holds a NaN or an infinity, which JSON lacks.
        OSError: The file cannot be written. An older file is unchanged.
    """
    write_text(path, json_text(content))


def json_text(content: Mapping[str, Any] | Sequence[Any]) -> str:
    """Return indented JSON.

    Raises:
        ValueError: The content holds a NaN or an infinity, which JSON lacks.
    """
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


@contextmanager
def complete_directory(path: Path) -> Iterator[Path]:
    """Create a directory that gets its name only when the body has filled it.

    Its files, their names and its own name are on the disk when this returns, so that an older
    directory can then be removed.

    Args:
        path: The directory, which must not exist yet.

    Yields:
        The directory to fill, which has a temporary name.

    Raises:
        OSError: The directory cannot be written. Errors of the body are raised too. In either
            case no directory is left, neither under its name nor under the temporary one.
    """
    with atomic_write(path) as unfinished:
        unfinished.mkdir()
        yield unfinished


def remove_directory(path: Path) -> None:
    """Rename a directory, if it exists, and remove it, so that no part of it looks complete."""
    if not path.is_dir():
        return
    doomed = tempfile.mkdtemp(prefix=f".{path.name}.", suffix=UNFINISHED, dir=path.parent)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def remove_unfinished(directory: Path, names: str) -> None:
    """Remove what killed writers of files or directories called ``names`` left in a directory.

    Args:
        directory: A directory that only this process writes into.
        names: A pattern, for example ``step-*``.
    """
    for leftover in directory.glob(f".{names}.*{UNFINISHED}"):
        shutil.rmtree(leftover, ignore_errors=True)


@dataclass(frozen=True)
class Output:
    """A file that an option names, checked by ``output_file`` before the work begins.

    Attributes:
        path: The file, None for standard output.
        sealed: Whether the file gets its digest beside it (``prm.digests``).
    """

    path: Path | None
    sealed: bool = False

    @contextmanager
    def file(self) -> Iterator[Path]:
        """Yield a temporary name to write to; the output is what was written there.

        Raises:
            OSError: The output cannot be written. An older file is unchanged.
        """
        if self.path is None:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "output"
                yield file
                write_bytes(file.read_bytes())
            return
        with atomic_write(self.path) as unfinished:
            yield unfinished
        if self.sealed:
            write_digest(self.path)

    def write_text(self, text: str) -> None:
        """Write the whole content, as UTF-8.

        Raises:
            OSError: The output cannot be written. An older file is unchanged.
        """
        self.write_lines([text])

    def write_lines(self, lines: Iterable[str]) -> None:
        """Write the whole content, as UTF-8, line by line (each with its line break).

        Raises:
            OSError: The output cannot be written. An older file is unchanged.
        """
        with (
            self.file() as unfinished,
            unfinished.open("w", encoding="utf-8", newline="\n") as file,
        ):
            file.writelines(lines)

    def say(self, text: str) -> None:
        """Print a line about the output, on standard error if the output is standard output."""
        say(f"{STANDARD_OUTPUT if self.path is None else self.path}: {text}", self.path is None)


def refuse_other_kind(flag: str, path: Path) -> None:
    """Refuse a name that says of a file of plain JSON that it is compressed, or a table.

    Raises:
        OptionError: The name ends so.
    """
    if path.suffix.lower() in _OTHER_KINDS:
        plain = path.name[: -len(path.suffix)]
        better = plain if Path(plain).suffix else f"{plain}.jsonl"
        raise OptionError(
            f"{flag} {path}: what is written is plain JSON, not {path.suffix}; name it {better}"
        )


def output_file(
    flag: str,
    name: str,
    *,
    overwrite: bool = False,
    inputs: Sequence[str | None] = (),
    sealed: bool = False,
    streams: bool = True,
) -> Output:
    """Return the output that an option names, which can be written as far as one can know.

    Args:
        flag: The option, for messages.
        name: The file, or ``-`` for standard output.
        overwrite: Whether an existing file is replaced.
        inputs: Files that the command reads, which are never replaced.
        sealed: Whether the file gets its digest beside it.
        streams: Whether the output may be standard output.

    Raises:
        OptionError: The file, or a list of rows that an earlier one left out, exists, or it is no
            file or an input.
        WriteError: The file cannot be written.
    """
    if name == STANDARD_OUTPUT:
        if not streams:
            raise OptionError(f"{flag} -: expected a file, not standard output; name one")
        return Output(None)
    path = Path(name)
    refuse_other_kind(flag, path)
    lists = (skipped_path(path), truncated_path(path))
    beside = (*((digest_path(path),) if sealed else ()), *lists)
    check_new_file(flag, path, overwrite=overwrite, inputs=inputs, beside=beside)
    return Output(path, sealed)


def check_new_file(
    flag: str,
    path: Path,
    *,
    overwrite: bool,
    inputs: Sequence[str | Path | None] = (),
    beside: Sequence[Path] = (),
) -> None:
    """Refuse a file that an option names and that cannot be written, or may not be replaced.

    Args:
        flag: The option, for messages.
        path: The file.
        overwrite: Whether an existing file is replaced.
        inputs: Files that the command reads, which are never replaced.
        beside: Files that are written with it.

    Raises:
        OptionError: A file exists, or it is no file or an input.
        WriteError: The file cannot be written.
    """
    check_writable(flag, path)
    if path.is_dir():
        raise OptionError(f"{flag} {path}: is a directory; name a file")
    for other in inputs:
        if other is not None and path.exists() and Path(other).exists() and path.samefile(other):
            raise OptionError(f"{flag} {path}: is a file that is read; name another")
    for there in (path, *beside):
        if there.exists() and not overwrite:
            raise OptionError(
                f"{flag} {path}: {'' if there is path else f'{there.name} '}exists; remove it, "
                "give another name, or give --overwrite"
            )


def need_output_for_lists(options: ReadOptions, output: Path | None) -> None:
    """Refuse to leave rows out, or to cut them, without an output file to list them beside.

    Raises:
        OptionError: The options ask for it.
    """
    if output is None:
        given = {"--on-bad-row": str(options.on_bad_row)}
        if isinstance(options, LoaderOptions):
            given["--too-long"] = options.too_long
        flags = ", ".join(f"{flag} {value}" for flag, value in given.items() if value != "refuse")
        if flags:
            raise OptionError(f"{flags}: needs --output, beside which the list is written")


def new_directory(flag: str, name: str) -> Path:
    """Return the directory that an option names, which is absent or empty and can be written.

    Raises:
        OptionError: There is a file or a directory with files.
        WriteError: The directory cannot be written.
    """
    path = Path(name)
    check_writable(flag, path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise OptionError(f"{flag} {name}: exists; remove it or give another name")
    return path


def check_writable(flag: str, path: Path) -> None:
    """Find out before the work whether a file can be written, by writing a byte beside it.

    Raises:
        OptionError: It is a device or a pipe.
        WriteError: It cannot be written; the message says why.
    """
    try:
        folder = real_target(path).absolute().parent
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\n")
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise OptionError(f"{flag} {path}: {error.strerror}") from error
        raise WriteError(f"{flag} {path}: cannot be written ({error.strerror})") from error


def note_unchecked(path: Path) -> None:
    """Say that a file that was read has no digest beside it, so that a change is not noticed."""
    if not digest_path(path).exists():
        say(f"note: {path}: no {digest_path(path).name} beside it to check it with", error=True)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Add the name of a file to an error of the body that names none, as those of writing do.

    Raises:
        OSError: The error of the body.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
