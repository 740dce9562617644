"""Files that are either the old ones or complete, whenever a process or machine stops."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path``; what was written there then replaces ``path``.

    The content reaches the disk (fsync) before it gets the name, and the name when this returns. If
    the body fails, ``path`` is as it was and the temporary file is gone.

    Args:
        path: The file to write; its folder exists.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        _follow_umask(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
