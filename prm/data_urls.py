"""Pictures that lie in a record itself, held as ``data:`` URLs where others are paths of files.

``StepExample.images`` are paths. A picture of which only the bytes are known is the path
``data:image/png;base64,...``, so that it is compared, written and read back like any other. The
base64 is the one for file names ("-" and "_"), since a path would join repeated slashes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from pathlib import Path
from typing import IO
from urllib.parse import unquote_to_bytes

PREFIX = "data:"
_URL_SIGNS = str.maketrans("-_", "+/")
_SIGNS = {
    b"\x89PNG": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"RIFF": "image/webp",
    b"BM": "image/bmp",
    b"II*\0": "image/tiff",
    b"MM\0*": "image/tiff",
}


def embedded(content: bytes) -> Path:
    """Return the path that stands for a picture of these bytes."""
    kind = next((name for sign, name in _SIGNS.items() if content.startswith(sign)), "")
    return Path(f"{PREFIX}{kind};base64,{base64.urlsafe_b64encode(content).decode()}")


def is_embedded(path: Path) -> bool:
    """Whether ``path`` stands for a picture in the record instead of a file."""
    return str(path).startswith(PREFIX)


def decoded(text: str) -> bytes:
    """Return the bytes of base64 in either alphabet; white space and missing padding are allowed.

    Raises:
        ValueError: The text is no base64, or holds no byte.
    """
    plain = "".join(text.split()).translate(_URL_SIGNS).rstrip("=")
    try:
        content = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(str(error)) from error
    if not content:
        raise ValueError("no byte")
    return content


def url_content(url: str) -> bytes:
    """Return the bytes of a ``data:`` URL (RFC 2397).

    Raises:
        ValueError: It has no comma, or its data are no base64, or there are none.
    """
    head, comma, data = url.removeprefix(PREFIX).partition(",")
    if not comma:
        raise ValueError("no comma before the data")
    if head.rstrip().lower().endswith(";base64"):
        return decoded(unquote_to_bytes(data).decode("ascii", "replace"))
    content = unquote_to_bytes(data)
    if not content:
        raise ValueError("no byte")
    return content


def picture_key(path: Path) -> str:
    """Return what a picture is remembered by: its path, or a hash of one in the record."""
    text = str(path)
    if not text.startswith(PREFIX):
        return text
    return PREFIX + hashlib.blake2b(text.encode("utf-8", "surrogatepass")).hexdigest()


def to_url(path: Path) -> str:
    """Return an embedded picture as a ``data:`` URL in the common alphabet of base64."""
    head, comma, data = path.as_posix().partition(",")
    return head + comma + data.translate(_URL_SIGNS)


def opened(path: Path) -> IO[bytes]:
    """Open a file, or an embedded picture, to read its bytes.

    Raises:
        OSError: The file cannot be opened.
    """
    return io.BytesIO(url_content(str(path))) if is_embedded(path) else path.open("rb")


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a file or of an embedded picture.

    Raises:
        OSError: The file cannot be read.
    """
    with opened(path) as file:
        return file.read()


def shown(path: Path) -> str:
    """Return the path for a message; an embedded picture by its kind, size and first characters."""
    text = str(path)
    return text if not is_embedded(path) else f"an embedded picture ({text[:40]}...)"
