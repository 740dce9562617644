"""Files that are taken for pictures or rows by their names are called what they are."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import tarfile
import zipfile

import pytest
from PIL import Image

from prm.data.containers import unlike_rows
from prm.inputs.tiles import image_size, read_image
from prm.schema import DataError
from prm.signatures import beginning, content_of


def archive(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as packed:
            packed.writestr("x.png", b"x")
    else:
        with tarfile.open(fileobj=file, mode="w") as packed:
            packed.addfile(tarfile.TarInfo("x.png"))
    return file.getvalue()


def mp4(major: bytes, *others: bytes) -> bytes:
    box = major + b"\0\0\0\0" + b"".join(others)
    return (8 + len(box)).to_bytes(4, "big") + b"ftyp" + box + b"\0" * 40


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, kind)
    return file.getvalue()


OTHERS = {
    "an empty file": (b"", "download"),
    "zero bytes": (bytes(4096), "cut off"),
    "a web page (HTML)": (b"\xef\xbb\xbf \n<!DOCTYPE html>\n<html></html>", "the file itself"),
    "a page of HTML or XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied', "the file itself"),
    "a pointer of Git LFS in place of the file": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "run git lfs pull",
    ),
    "a pointer of git-annex in place of the file": (b"/annex/objects/SHA256E-s9", "git annex get"),
    "an SVG drawing": (b"<?xml version='1.0'?>\n<!-- by x -->\n<svg xmlns=''>", "convert it"),
    "a PDF file": (b"%PDF-1.7\n%\xe2\xe3", "convert it"),
    "a PostScript file": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "convert it"),
    "a HEIC image": (mp4(b"heic", b"mif1", b"heic"), "convert it"),
    "an AVIF image": (mp4(b"mif1", b"avif", b"miaf"), "convert it"),
    "a video (MP4, MOV)": (mp4(b"isom", b"iso2", b"avc1"), "convert it"),
    "a JPEG XL image": (b"\xff\x0a\xfa\x1f", "convert it"),
    "a JPEG 2000 image": (b"\0\0\0\x0cjP  \r\n\x87\n", "convert it"),
    "a Windows icon": (b"\0\0\1\0\1\0\x10\x10", "convert it"),
    "a ZIP archive": (archive("zip"), "unpack it"),
    "a tar archive": (archive("tar"), "unpack it"),
    "a pickle of Python": (pickle.dumps(list(range(99)), 4), "convert it"),
    "the address of a file": (b"https://example.org/x.png\n", "the file itself"),
    "a picture in base64, as text": (b"iVBORw0KGgoAAAANSUhEUgAA", "decode it"),
}


@pytest.mark.parametrize(("name", "content", "remedy"), [(k, *v) for k, v in OTHERS.items()])
def test_what_is_no_picture_and_no_rows_has_one_name_for_both(tmp_path, name, content, remedy):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    for read in (read_image, image_size):
        with pytest.raises(DataError) as caught:
            read(path)
        assert caught.value.found == name
        assert remedy in caught.value.remedy
    if content:
        assert unlike_rows(content).found == name
        assert remedy in unlike_rows(content).remedy


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_picture_is_to_be_unpacked(tmp_path, pack):
    path = tmp_path / "x.png"
    path.write_bytes(pack(picture("PNG")))
    with pytest.raises(DataError, match=r"found a file compressed by .*; unpack it"):
        read_image(path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"404: Not Found\n", "text that begins with '404: Not Found'"),
        (b'{"error": "no such key"}', 'text that begins with \'{"error": "no such key"}\''),
        ("h\u00e9" * 999, "text that begins with"),
        (b"\x07\x08 no text", "content of another kind"),
        (b"\xfe\xfe\xfe", "content of another kind"),
    ],
)
def test_other_text_is_quoted_and_the_rest_is_not(tmp_path, content, found):
    path = tmp_path / "x.png"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as caught:
        read_image(path)
    assert found in caught.value.found
    assert len(caught.value.found) < 80


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_pictures_given_for_rows_are_named_and_torn_ones_are_called_damaged(tmp_path, kind):
    whole = picture(kind)
    assert unlike_rows(whole).found == f"a {kind} image"
    path = tmp_path / "x.png"
    path.write_bytes(whole[:9])
    with pytest.raises(DataError) as caught:
        read_image(path)
    assert any(word in caught.value.found.lower() for word in ("truncated", "damaged"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_picture_of_an_accepted_kind_is_no_other_content(kind):
    content = content_of(picture(kind))
    assert content is None or content.name == f"a {kind} image"


@pytest.mark.parametrize("text", [b'{"a": 1}', b"[1]", b'\xef\xbb\xbf{"a": 1}', b' \n{"a": "<b>"}'])
def test_json_is_no_other_content(text):
    assert content_of(text) is None


def test_a_character_that_is_cut_off_at_the_end_is_left_out():
    assert beginning("caf\u00e9".encode()[:-1]) == "'caf'"
