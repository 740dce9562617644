"""What a request may ask, and the field that a refusal names; no server is needed."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from prm.data_urls import embedded
from prm.schema import DataError
from recipes.serve.requests import Limits, read_request

LIMITS = Limits(
    body=10**6, candidates=3, steps=4, characters=100, images=2, image_bytes=2_000, pixels=600
)


def picture(width: int = 20, height: int = 30, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, kind)
    return file.getvalue()


PICTURE = base64.b64encode(picture()).decode()


def read(**fields):
    return read_request(json.dumps(fields).encode(), LIMITS)


def test_a_solution_is_a_text_or_steps_or_several_of_both():
    one = read(question="q", solution="Step 1: a\nStep 2: b")
    assert one.solutions == (("Step 1: a", "Step 2: b"),)
    assert read(question="q", steps=["a", "b\n\nc"]).solutions == (("a", "b\n\nc"),)
    several = read(question="q", solutions=["a\n\nb", ["a", "b"]], images=None)
    assert several.solutions == (("a", "b"), ("a", "b"))
    assert several.are_texts == (True, False)
    assert several.images == ()


def test_a_picture_is_base64_of_either_alphabet_or_a_data_url():
    url = f"data:image/png;base64,{PICTURE}"
    signs = PICTURE.translate(str.maketrans("+/", "-_")).rstrip("=")
    for text in (PICTURE, signs, url):
        assert read(question="q", steps=["a"], images=[text]).images == (embedded(picture()),)


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"steps": ["a"]}, "question", "expected the field 'question', found nothing"),
        ({"question": 3, "steps": ["a"]}, "question", "a string, found the number 3"),
        ({"question": " ", "steps": ["a"]}, "question", "not blank"),
        ({"question": "q"}, "solution", "found none"),
        ({"question": "q", "steps": ["a"], "solution": "a"}, "steps", "found solution and steps"),
        ({"question": "q", "step": ["a"]}, "step", "rename it to 'steps'"),
        ({"question": "q", "solution": ["a"]}, "solution", "a string, found a list"),
        ({"question": "q", "steps": "a"}, "steps", "expected a list of steps, found the string"),
        ({"question": "q", "steps": ["a", None]}, "steps[1]", "a string, found null"),
        ({"question": "q", "steps": list("abcde")}, "steps", "at most 4 steps, found 5"),
        ({"question": "q", "solution": "a\n\nb\n\nc\n\nd\n\ne"}, "solution", "at most 4 steps"),
        ({"question": "q", "solutions": []}, "solutions", "at least one solution"),
        ({"question": "q", "solutions": ["a"] * 4}, "solutions", "at most 3 solutions, found 4"),
        ({"question": "q", "solutions": ["a", {}]}, "solutions[1]", "a text or a list of steps"),
        ({"question": "q", "solutions": [["a", 1]]}, "solutions[0][1]", "a string"),
        ({"question": "q" * 101, "steps": ["a"]}, "question", "at most 100 characters"),
        ({"question": "q", "solutions": ["a" * 60, ["a", "b" * 60]]}, "solutions[1][1]", "at most"),
        ({"question": "q", "steps": ["a"], "images": PICTURE}, "images", "a list of pictures"),
        ({"question": "q", "steps": ["a"], "images": [PICTURE] * 3}, "images", "at most 2 pict"),
        ({"question": "q", "steps": ["a"], "images": [PICTURE, 1]}, "images[1]", "a string"),
        ({"question": "q", "steps": ["a"], "images": ["data:,"]}, "images[0]", "in base64"),
    ],
)
def test_a_refusal_names_the_field(fields, field, said):
    with pytest.raises(DataError) as error:
        read(**fields)
    assert error.value.field == field
    assert str(error.value).startswith(f"field {field}: ")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (picture(30, 30), "at most 600 pixels, found 900"),
        (b"GIF8 is no picture", "field images[0]: expected"),
        (picture()[:20], "field images[0]: expected"),
        (picture(30, 20, "BMP") + bytes(300), "at most 2,000 bytes"),
    ],
)
def test_pictures_are_measured_by_their_headers(content, said):
    with pytest.raises(DataError) as error:
        read(question="q", steps=["a"], images=[base64.b64encode(content).decode()])
    assert error.value.field == "images[0]"
    assert said in str(error.value)


def test_a_picture_of_too_many_pixels_is_not_decoded(monkeypatch):
    def decoded(*_):
        raise AssertionError("decoded")

    large = base64.b64encode(picture(30, 30)).decode()
    monkeypatch.setattr(Image.Image, "load", decoded)
    with pytest.raises(DataError, match="found 900"):
        read(question="q", steps=["a"], images=[large])


@pytest.mark.parametrize("name", ["file", "/path", "//host", "http:", "HTTPS:", "object"])
def test_no_path_and_no_address_is_ever_opened(tmp_path, monkeypatch, name):
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture())
    asked = {
        "file": f"file://{secret}",
        "/path": str(secret),
        "//host": "//127.0.0.1/secret.png",
        "http:": "http://127.0.0.1/secret.png",
        "HTTPS:": "HTTPS://127.0.0.1/secret.png",
        "object": {"path": str(secret), "bytes": None},
    }[name]
    touched = []
    monkeypatch.setattr(Path, "open", lambda self, *_, **__: touched.append(self))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: touched.append("host"))
    with pytest.raises(DataError) as error:
        read(question="q", steps=["a"], images=[asked])
    assert error.value.field == "images[0]"
    assert touched == []


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "a blank line"),
        (b"{", "JSON"),
        (b"[]", "expected a JSON object, found an empty list"),
        (b'{"question": "a", "question": "b"}', "question"),
        (b'{"question": "\\ud800"}', "surrogate"),
        (b'{"question": NaN}', "NaN"),
        (b"[" * 100_000, "JSON"),
        (b'{"question": "\xff"}', "UTF-8"),
        (b'{"question": ' + b"1" * 5_000 + b"}", ""),
    ],
)
def test_what_is_no_json_object_is_refused(raw, said):
    with pytest.raises(DataError) as error:
        read_request(raw, LIMITS)
    assert said in str(error.value)
    assert error.value.file is None
    assert error.value.line is None


def test_an_error_of_the_scorer_gets_the_field_of_the_request():
    several = replace(read(question="q", solutions=["a", ["a", "b"]]), images=(Path("data:,b"),))
    of_step = DataError(expected="x", found="y", field="steps[1]", example="solutions[7]")
    assert several.refusal(0, of_step).field == "solutions[0]"
    assert several.refusal(1, of_step).field == "solutions[1][1]"
    assert str(several.refusal(1, of_step)) == "field solutions[1][1]: expected x, found y"
    of_picture = DataError(expected="x", found="y", file=Path("data:,b"), remedy="--too-long")
    assert str(several.refusal(1, of_picture)) == "field images[0]: expected x, found y"
    of_question = DataError(expected="x", found="y", field="question")
    assert several.refusal(1, of_question).field == "question"
    of_length = DataError(expected="x", found="y")
    assert read(question="q", steps=["a"]).refusal(0, of_length).field == "steps"
