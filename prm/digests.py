"""The digest of a file, beside it: a bit that a disk or a copy has changed is noticed.

``NAME.sha256`` has the form that ``sha256sum`` writes, and that ``sha256sum --check`` reads.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from prm.files import write_lines
from prm.schema import DataError


def digest_path(path: Path) -> Path:
    """Return the path of the digest of a file."""
    return path.with_name(path.name + ".sha256")


def write_digest(path: Path) -> None:
    """Write the digest of a file beside it.

    Raises:
        OSError: The file cannot be read, or the digest cannot be written.
    """
    write_lines(digest_path(path), [f"{digest_file(path)}  {path.name}\n"])


def check_digest(path: Path) -> bool:
    """Compare a file with the digest beside it.

    Returns:
        Whether there is a digest. Without one, nothing is known of the file.

    Raises:
        DataError: The file is not as it was when its digest was written.
        OSError: The file or its digest cannot be read.
    """
    try:
        stored = digest_path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return False
    if stored.split(" ")[0] != digest_file(path):
        raise DataError(
            expected=f"the content whose SHA-256 stands in {digest_path(path).name}",
            found="another: the file was changed after it was written, or is damaged",
            file=path,
            remedy=f"write it again; or, if you changed it yourself, remove {digest_path(path)}",
        )
    return True


def digest_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
