"""What a file holds, by its first bytes: what is taken for pictures or rows by its name alone."""

from __future__ import annotations

import codecs
from typing import NamedTuple

LOOK = 1024
"""How many bytes tell."""
_UNPACK = "unpack it, and name the file in it"
_AGAIN = "replace or re-download the file"
_DOWNLOAD = "download the file itself"
_MP4_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "an AVIF image"),
    **dict.fromkeys(
        (b"heic", b"heix", b"heim", b"heis", b"heif", b"hevc", b"hevx"), "a HEIC image"
    ),
    **dict.fromkeys((b"mif1", b"msf1"), "a HEIC image"),  # unless another brand says AVIF
}
_SHOWN = 40
_UTF8 = codecs.getincrementaldecoder("utf-8")


class Content(NamedTuple):
    """What a file holds, and what to do about it, None to convert it to what was expected."""

    name: str
    remedy: str | None = None


_PACKED = {
    **{b"PK\x03\x04": "a ZIP archive", b"7z\xbc\xaf": "a 7z archive", b"Rar!": "a RAR archive"},
    **{b"\x1f\x8b": "a file compressed by gzip", b"BZh": "a file compressed by bzip2"},
    **{b"\xfd7zXZ": "a file compressed by xz", b"(\xb5/\xfd": "a file compressed by zstandard"},
}
_BINARY = {
    **{b"\x89PNG": "a PNG image", b"\xff\xd8\xff": "a JPEG image", b"GIF8": "a GIF image"},
    **{b"\xff\n": "a JPEG XL image", b"\0\0\0\x0cJXL ": "a JPEG XL image"},
    **{b"\0\0\0\x0cjP  ": "a JPEG 2000 image", b"\0\0\1\0": "a Windows icon"},
    **{b"8BPS": "a Photoshop file", b"%!PS": "a PostScript file", b"%PDF": "a PDF file"},
    **{b"\x1aE\xdf\xa3": "a video (Matroska, WebM)", b"\x89HDF": "an HDF5 file"},
    **{b"SQLite format 3": "an SQLite data base", b"\x93NUMPY": "a NumPy array"},
    **dict.fromkeys((b"\x80\2", b"\x80\3", b"\x80\4\x95", b"\x80\5\x95"), "a pickle of Python"),
}
_TEXT = {
    b"version https://git-lfs": Content(
        "a pointer of Git LFS in place of the file", "run git lfs pull"
    ),
    **dict.fromkeys(
        (b"/annex/objects/", b".git/annex/", b"../.git/annex/"),
        Content("a pointer of git-annex in place of the file", "run git annex get"),
    ),
    **dict.fromkeys(
        (b"<!doctype html", b"<html", b"<head", b"<body", b"<script"),
        Content("a web page (HTML)", _DOWNLOAD),
    ),
    **dict.fromkeys((b"<svg", b"<!doctype svg"), Content("an SVG drawing")),
    **dict.fromkeys((b"<?xml", b"<!--", b"<"), Content("a page of HTML or XML", _DOWNLOAD)),
    **dict.fromkeys((b"http://", b"https://"), Content("the address of a file", _DOWNLOAD)),
    **dict.fromkeys(
        (b"data:image/", b"ivborw0kgg", b"/9j/4"),
        Content("a picture in base64, as text", "decode it, or write it into the record"),
    ),
}
"""In lower case, and the more special first."""


def content_of(start: bytes) -> Content | None:
    """Return what a file holds that begins with ``start``, up to ``LOOK`` bytes; None if unknown.

    Text is known only if it is a page, a drawing, or stands in the place of a file.
    """
    if not start:
        return Content("an empty file", _AGAIN)
    if not start.strip(b"\0"):
        return Content("zero bytes", f"{_AGAIN}; it was cut off on its way")
    if start[4:8] == b"ftyp":
        return Content(_mp4(start))
    if start[:4] == b"RIFF" and start[8:12] != b"WEBP":
        return Content("a video or a sound (RIFF)")
    if start[257:262] == b"ustar":
        return Content("a tar archive", _UNPACK)
    for sign, name in _PACKED.items():
        if start.startswith(sign):
            return Content(name, _UNPACK)
    for sign, name in _BINARY.items():
        if start.startswith(sign):
            return Content(name)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<?xml", b"<!--")) and (b"<svg" in text or b"<html" in text):
        text = text[min(at for sign in (b"<svg", b"<html") if (at := text.find(sign)) >= 0) :]
    return next((kind for sign, kind in _TEXT.items() if text.startswith(sign)), None)


def beginning(start: bytes) -> str | None:
    """Return the first line of text for a message, None if the bytes are no text."""
    try:
        text = _UTF8().decode(start).strip()  # a character that is cut off is left out
    except UnicodeDecodeError:
        return None
    line = text.partition("\n")[0].strip()
    if not line or not all(map(str.isprintable, line.replace("\t", " "))):
        return None
    return repr(line if len(line) <= _SHOWN else f"{line[: _SHOWN - 3]}...")


def _mp4(start: bytes) -> str:
    """Name the content of an ISO base media file by its brands, the major one first."""
    size = int.from_bytes(start[:4], "big")
    brands = [start[8:12], *(start[at : at + 4] for at in range(16, min(size, LOOK), 4))]
    names = [_MP4_BRANDS[brand] for brand in brands if brand in _MP4_BRANDS]
    if not names:
        return "a video (MP4, MOV)"
    return "an AVIF image" if "an AVIF image" in names else names[0]
