"""Files and folders that appear under their names only when they are complete.

The whole package writes in one way: into a folder of its own beside the target
(``.NAME.RANDOM.unfinished``, a name that nobody else has), which is flushed to the disk and then
renamed. A writer that fails leaves the previous file as it was; one that is killed leaves its own
folder, too, which nothing reads.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".unfinished"
"""The end of the temporary names."""

_AT_ONCE = 16
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary name for a file or a folder, which is renamed to ``path`` at the end.

    The body of the ``with`` statement writes a file, or creates and fills a folder, under the name
    that it is given. The result is flushed to the disk (each file of a folder) and renamed, and the
    rename is flushed, too. If the body raises, the result is removed.

    Args:
        path: The target, whose folder is created if it does not exist. A file is replaced, and
            keeps its permissions; a folder must be empty or not exist. Of a symbolic link, what it
            points to is replaced.

    Yields:
        The temporary name, in a new folder beside the target.

    Raises:
        OSError: The target is a folder that is not empty, a device or a pipe, or writing fails. The
            error names ``path`` and not the temporary name.
    """
    target = real_target(path)
    folder = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(
            tempfile.mkdtemp(prefix=f".{target.name[:40]}.", suffix=UNFINISHED, dir=target.parent)
        )
        unfinished = folder / target.name
        yield unfinished
        _follow_umask(unfinished)
        _flush_all(unfinished)
        if target.is_file():
            shutil.copymode(target, unfinished)
        os.replace(unfinished, target)
        flush(target.parent)
    except OSError as error:
        if (named := _named(error, folder, path)) is None:
            raise
        raise named from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a UTF-8 file of ``lines`` (each with its line break), or leave ``path`` as it was."""
    with (
        atomic_write(path) as unfinished,
        unfinished.open("w", encoding="utf-8", newline="\n") as file,
    ):
        file.writelines(lines)


def real_target(path: Path) -> Path:
    """Return the file or folder that a write to ``path`` replaces; symbolic links are followed.

    Raises:
        OSError: ``path`` is a device, a pipe, a socket, or a symbolic link to itself. Such a node
            is never replaced by a file.
    """
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return target
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "is a device or a pipe; expected a file", str(path))
    return target


def flush(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    is_folder = path.is_dir()
    if is_folder and os.name != "posix":
        return  # elsewhere a folder cannot be opened
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush_all(path: Path) -> None:
    """Flush a file, or a folder and all below it; folders after what is in them."""
    folders = [Path(folder) for folder, _, _ in os.walk(path, topdown=False)]
    files = [inside for folder in folders for inside in folder.iterdir() if inside.is_file()]
    # At once: a disk flushes many small files together (1,870 pictures: 0.4 s, not 11 s).
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(flush, files))
    for folder in folders or [path]:
        flush(folder)


def _named(error: OSError, folder: Path | None, path: Path) -> OSError | None:
    """Return an error of writing with the name of the target; None for an error of the body."""
    temporary = folder is None or str(error.filename or "").startswith(str(folder))
    if temporary or (error.filename is None and error.errno in _NO_ROOM):
        return OSError(error.errno, error.strerror, str(path))
    return None


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
