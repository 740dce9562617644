"""Files that are either the old ones or complete, whenever a process or machine stops."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path``; what was written there then replaces ``path``.

    The content reaches the disk (fsync) before it gets the name, and the name when this returns. If
    the body fails, ``path`` is as it was and the temporary file is gone. The temporary name lies in
    a new folder, so it is nobody else's. Of a symbolic link, the file that it points to is
    replaced.

    Args:
        path: The file to write; its folder exists.

    Raises:
        OSError: ``path`` is there and no regular file (a device or a pipe is never replaced), or
            the file cannot be written.
    """
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise OSError(f"{path}: expected a file to replace, found a folder, a device or a pipe")
    folder = Path(
        tempfile.mkdtemp(prefix=f".{target.name[:40]}.", suffix=".unfinished", dir=target.parent)
    )
    try:
        temporary = folder / target.name
        yield temporary
        _follow_umask(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _flush(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 ``text`` by ``replacing`` the file."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _follow_umask(path: Path) -> None:
    """Give a file of the mode 0600, as safetensors makes it, the mode of other new files."""
    if path.stat().st_mode & 0o777 != 0o600:
        return
    # The umask can be read only by setting it, for all threads at once; a new file shows it.
    probe = path.with_name(f"{path.name}.mode")
    with probe.open("x") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
    probe.unlink()
    path.chmod(mode)
