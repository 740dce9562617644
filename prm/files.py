"""Files and folders that appear under their names only when they are complete.

The whole package writes in one way: to a temporary name beside the target
(``.NAME.PID.unfinished``), which is flushed to the disk and then renamed. A writer that fails, or
is killed, leaves the previous file as it was.
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

    The body of the ``with`` statement writes a file, or creates and fills a folder, under the name
    that it is given. The result is flushed to the disk (each file of a folder) and renamed, and the
    rename is flushed, too. If the body raises, the result is removed.

    Args:
        path: The target. A file is replaced; a folder must be empty or not exist.

    Yields:
        The temporary name, in the folder of ``path``.

    Raises:
        OSError: The target is a folder that is not empty, or writing fails.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        _follow_umask(unfinished)
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


def _follow_umask(path: Path) -> None:
    """Give files of the mode 0600, as safetensors makes them, the mode of other new files."""
    paths = path.rglob("*") if path.is_dir() else [path]
    private = [each for each in paths if each.is_file() and each.stat().st_mode & 0o777 == 0o600]
    if not private:
        return
    # The umask can be read only by setting it, for all threads at once; a new file shows it.
    probe = private[0].with_name(f"{private[0].name}.mode")
    with probe.open("x") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
    probe.unlink()
    for each in private:
        each.chmod(mode)
