"""Pictures in records: their bytes come back, from every way in which files write them."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prm.data.reader import read_examples, read_jsonl, write_jsonl
from prm.data.record_fields import Location
from prm.data.records import relative
from prm.data_urls import embedded, is_embedded, read_bytes, to_url, url_content
from prm.inputs.tiles import image_size, read_image
from prm.schema import DataError, Step, StepExample
from tests.prm.tiny import save_image


@pytest.fixture
def picture(tmp_path) -> bytes:
    return save_image(tmp_path / "x.png", 24, 16).read_bytes()


@given(st.binary(min_size=1))
def test_the_bytes_of_an_embedded_picture_come_back(content):
    path = embedded(content)
    assert is_embedded(path)
    assert read_bytes(path) == content
    assert Path(str(path)) == path  # slashes in base64 would be joined by a path
    assert url_content(to_url(path)) == content


@given(st.binary(min_size=1))
def test_every_way_of_writing_a_picture_is_the_same_picture(content):
    plain = base64.b64encode(content).decode()
    location = Location(Path("/images"))
    ways = [
        f"data:image/png;base64,{plain}",
        f"DATA:Image/PNG;BASE64,{plain}",
        f"data:;base64,{plain.replace('+', '%2B').replace('/', '%2F')}",
        {"bytes": content, "path": None},
        {"bytes": plain, "path": "a.png"},
        {"bytes": base64.encodebytes(content).decode()},
    ]
    assert {location.image(way, "image") for way in ways} == {embedded(content)}


def test_a_file_url_and_an_object_with_a_path_are_paths():
    location = Location(Path("/images"))
    for scheme in ("file", "File"):
        assert location.image(f"{scheme}:///a/b%20c.png", "image") == Path("/a/b c.png")
    assert location.image({"bytes": None, "path": "x.png"}, "image") == Path("/images/x.png")


@pytest.mark.parametrize(
    ("value", "field", "found"),
    [
        ("https://example.org/x.png", "image", "https"),
        ("s3://bucket/x.png", "image", "s3"),
        ("data:image/png;base64,??", "image", "base64"),
        ("data:image/png;base64,", "image", "no byte"),
        ("data:image/png", "image", "no comma"),
        ({"bytes": "??"}, "image.bytes", "base64"),
        ({"bytes": b""}, "image.bytes", "base64"),
        ({"bytes": None, "path": None}, "image", "an object"),
        ({"bytes": None, "path": 3}, "image.path", "the number 3"),
    ],
)
def test_what_is_no_picture_is_named(value, field, found):
    with pytest.raises(DataError) as caught:
        Location(Path("/images")).image(value, "image")
    assert caught.value.field == field
    assert found in str(caught.value)


def test_an_embedded_picture_is_decoded_as_its_file_is(tmp_path, picture):
    path = embedded(picture)
    assert read_image(path).tobytes() == read_image(tmp_path / "x.png").tobytes()
    assert image_size(path) == image_size(tmp_path / "x.png")


def test_rows_with_pictures_are_checked_written_and_read_back(tmp_path, picture):
    example = StepExample("a", "q", (embedded(picture),), (Step("s", 1.0),))
    write_jsonl(tmp_path / "own.jsonl", [example])
    assert read_jsonl(tmp_path / "own.jsonl", check_images=True) == [example]
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    assert relative(embedded(picture), tmp_path) == url
    assert url in (tmp_path / "own.jsonl").read_text(encoding="utf-8")


def test_a_broken_picture_in_a_row_is_named_without_its_bytes(tmp_path, picture):
    example = StepExample("a", "q", (embedded(picture[:-20] * 40),), (Step("s", 1.0),))
    write_jsonl(tmp_path / "own.jsonl", [example])
    for check in ("decode", "header", "sample"):
        with pytest.raises(DataError) as caught:
            read_examples(tmp_path / "own.jsonl", check_images=check)
        assert caught.value.field == "images[0]"
        assert "an embedded picture (data:image/png;base64," in caught.value.found
        assert len(str(caught.value)) < 500
