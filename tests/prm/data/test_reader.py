from __future__ import annotations

import json
import pickle
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prm.data.reader import iter_rows, read_jsonl, write_jsonl
from prm.data.record_fields import Location
from prm.data.records import parse
from prm.schema import DataError, Step, StepExample
from tests.prm.tiny import save_image

GOOD = {"id": "a", "question": "how many?", "steps": [{"text": "two", "label": "+"}]}


def line(**changes) -> str:
    record = {**GOOD, **changes}
    return json.dumps({key: value for key, value in record.items() if value is not ...})


def write(folder: Path, *lines: str | bytes) -> Path:
    path = folder / "data.jsonl"
    path.write_bytes(b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in lines))
    return path


def test_reads_every_field(tmp_path):
    save_image(tmp_path / "x.png", 8, 8)
    steps = [{"text": "s", "label": x} for x in ("+", "-", 0.25, 1, None)] + [{"text": "t"}]
    path = write(
        tmp_path,
        line(
            images=["x.png"], steps=steps, domain="d", answer="", correct=False, group="g",
            source=["kept", 1],
        ),
        line(id="b"),
    )  # fmt: skip
    first, second = read_jsonl(path)
    assert [step.label for step in first.steps] == [1.0, 0.0, 0.25, 1.0, None, None]
    assert first.images == (tmp_path / "x.png",)
    assert (first.domain, first.answer, first.correct, first.group) == ("d", "", False, "g")
    assert first.extra == {"source": ["kept", 1]}
    assert second == StepExample("b", "how many?", (), (Step("two", 1.0),))


BAD_LINES = {
    "malformed": ('{"id": "a"', None, "JSON", "column", "one complete JSON object"),
    "not an object": ("[1]", None, "a JSON object", "a list of 1", "one object per line"),
    "blank line": ("  ", None, "a JSON object", "a blank line", "remove"),
    "no id": (line(id=...), "id", "'id'", "nothing", None),
    "no steps": (line(steps=...), "steps", "'steps'", "nothing", None),
    "number as id": (line(id=3), "id", "a string", "the number 3", None),
    "blank id": (line(id=" "), "id", "not blank", "' '", None),
    "null question": (line(question=None), "question", "a string", "null", None),
    "surrogate": (line(question="\ud800"), "question", "UTF-8", "surrogate", None),
    "steps not a list": (line(steps="two"), "steps", "a list", "'two'", None),
    "empty steps": (line(steps=[]), "steps", "at least one step", "an empty list", "remove"),
    "step a string": (line(steps=["two"]), "steps[0]", "an object", "'two'", None),
    "no text": (line(steps=[{"label": "+"}]), "steps[0].text", "'text'", "nothing", None),
    "invisible text": (line(steps=[{"text": "\u200b"}]), "steps[0].text", "not blank", "", None),
    "empty text": (line(steps=[{"text": ""}]), "steps[0].text", "not blank", "''", None),
    "unknown label": (
        line(steps=[{"text": "s"}, {"text": "s", "label": "good"}]),
        "steps[1].label", '"+", "-", a number in [0, 1] or null', "'good'", None,
    ),
    "label true": (line(steps=[{"text": "s", "label": True}]), "steps[0].label", '"+"', "true", ""),
    "label above 1": (
        line(steps=[{"text": "s", "label": 1.5}]), "steps[0].label", "[0, 1]", "1.5", None,
    ),
    "label NaN": (
        line(steps=[{"text": "s", "label": float("nan")}]), None, "finite", "NaN", "null",
    ),
    "label huge": (
        line(steps=[{"text": "s", "label": 0}]).replace("0", "1e999"), None, "finite", "1e999", "",
    ),
    "extra step key": (
        line(steps=[{"text": "s", "mc": 3}]), "steps[0].mc", "only 'text' and 'label'", "'mc'",
        "top level",
    ),
    "lable": (
        line(steps=[{"text": "s", "lable": "+"}]), "steps[0].lable", "'label'", "'lable'",
        "rename it to 'label'",
    ),
    "image": (line(image="x.png"), "image", "'images'", "'image'", "rename it to 'images'"),
    "upper case": (line(ID="b"), "ID", "'id'", "'ID'", "rename it to 'id'"),
    "images a string": (line(images="x.png"), "images", "a list", "'x.png'", "a list of one"),
    "image a number": (line(images=[3]), "images[0]", "a string", "3", None),
    "missing image": (line(images=["no.png"]), "images[0]", "image file", "no file at", "path"),
    "image a folder": (line(images=["."]), "images[0]", "image file", "a folder at", "path"),
    "correct a number": (line(correct=1), "correct", "true, false or null", "the number 1", None),
    "group a number": (line(group=1), "group", "a string", "the number 1", None),
    "domain blank": (line(domain=""), "domain", "not blank", "''", None),
    "same key twice": ('{"id": "a", "id": "b"}', None, "every key once", "'id' twice", None),
    "invalid utf-8": (b'{"id": "\xff"}', None, "UTF-8", "byte 0xff at column 9", "save"),
    "nested too deep": ("[" * 100_000, None, "JSON", "recursion", None),
    "huge integer": (line(note=0).replace("0", "9" * 5000), None, "JSON", "digits", None),
}  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "field", "expected", "found", "remedy"), BAD_LINES.values(), ids=BAD_LINES
)
def test_bad_line_is_refused_with_its_place(tmp_path, bad, field, expected, found, remedy):
    path = write(tmp_path, line(id="first"), bad)
    with pytest.raises(DataError) as caught:
        read_jsonl(path)
    error = caught.value
    assert (error.file, error.line, error.field) == (path, 2, field)
    assert expected in error.expected
    assert found in error.found
    assert (remedy or "") in (error.remedy or "")
    message = str(error)
    assert "\n" not in message
    assert len(message) < 400
    assert message.startswith(f"{path}:2: ")
    assert all(part in message for part in (error.expected, error.found, field or ""))


@pytest.mark.parametrize("mark", [b"\xff\xfe", b"\xfe\xff"])
def test_a_mark_of_utf16_is_named(tmp_path, mark):
    path = write(tmp_path, mark + line().encode())
    with pytest.raises(DataError, match="UTF-16 byte order mark; save the file as") as caught:
        read_jsonl(path)
    assert (caught.value.file, caught.value.line) == (path, 1)


def test_one_object_that_holds_lists_of_records_is_read_as_these(tmp_path):
    path = tmp_path / "pretty.json"
    first, second, third = ({**GOOD, "id": name} for name in "abc")
    path.write_text(json.dumps({"u1": [first, second], "u2": [third]}, indent=2))
    assert [(row.line, row.examples[0].id) for row in iter_rows(path)] == [
        (1, "a"), (2, "b"), (3, "c"),
    ]  # fmt: skip
    path.write_text(json.dumps({"u1": [first, second], "u2": [{**third, "steps": []}]}))
    assert [row.line for row in iter_rows(path) if isinstance(row, DataError)] == [3]
    path.write_text('{"u1": []}')  # holds nothing: an error, not no row
    assert [row.line for row in iter_rows(path) if isinstance(row, DataError)] == [1]
    # A record of a known format stays one, though it holds lists of objects.
    turn = {"role": "user", "content": "### Question: q\n\n### Solution Process:\ns"}
    path.write_text(json.dumps({"messages": [turn, {"role": "assistant", "content": "+"}]}))
    assert [row.format for row in iter_rows(path)] == ["messages"]


def test_the_formats_are_listed_once(tmp_path):
    path = write(tmp_path, '{"a": 1}', '{"a": 1}', '{"b": 1}', line())
    errors = [row for row in iter_rows(path) if isinstance(row, DataError)]
    assert [error.line for error in errors] == [1, 2, 3]
    assert "dreamprm-test" in errors[0].expected
    for error, key in zip(errors[1:], "ab", strict=True):
        assert error.expected == "a record of a known format, as listed for line 1"
        assert error.found == f"the keys {key!r}"


def test_empty_file_and_duplicate_id_are_refused(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"")
    with pytest.raises(DataError, match="at least one example, found an empty file"):
        read_jsonl(path)
    write(tmp_path, line(id="x"), line(id="y"), line(id="x"))
    with pytest.raises(DataError) as caught:
        read_jsonl(path)
    assert (caught.value.line, caught.value.field) == (3, "id")
    assert "first on line 1" in caught.value.found


def test_truncated_image_is_found_on_request(tmp_path):
    image = save_image(tmp_path / "x.png", 64, 64)
    image.write_bytes(image.read_bytes()[:-2000])
    path = write(tmp_path, line(images=["x.png"]))
    assert len(read_jsonl(path)) == 1
    with pytest.raises(DataError) as caught:
        read_jsonl(path, check_images=True)
    error = caught.value
    assert (error.file, error.line, error.field) == (path, 1, "images[0]")
    assert str(image) in error.found


def test_image_root(tmp_path):
    (tmp_path / "pictures").mkdir()
    image = save_image(tmp_path / "pictures" / "x.png", 8, 8)
    path = write(tmp_path, line(images=["x.png"]))
    with pytest.raises(DataError):
        read_jsonl(path)
    assert read_jsonl(path, tmp_path / "pictures")[0].images == (image,)


def test_unknown_keys_that_resemble_nothing_are_kept(tmp_path):
    path = write(tmp_path, line(idx=3, sid="s", score=1, labels=[1], dataset="d"))
    assert set(read_jsonl(path)[0].extra) == {"idx", "sid", "score", "labels", "dataset"}


def test_line_separators_inside_strings_do_not_split_lines(tmp_path):
    path = write(tmp_path, json.dumps({**GOOD, "question": "a\u2028b\x85c"}, ensure_ascii=False))
    assert read_jsonl(path)[0].question == "a\u2028b\x85c"


def _is_seen(text: str) -> bool:
    return any(not c.isspace() and unicodedata.category(c) not in ("Cc", "Cf") for c in text)


_TEXT = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), min_size=1
).filter(_is_seen)
_EXAMPLES = st.builds(
    StepExample,
    id=_TEXT,
    question=_TEXT,
    images=st.just(()),
    steps=st.lists(st.builds(Step, _TEXT, st.none() | st.floats(0, 1)), min_size=1, max_size=4).map(
        tuple
    ),
    domain=st.none() | _TEXT,
    answer=st.none() | st.text(st.characters(exclude_categories=("Cs",))),
    correct=st.none() | st.booleans(),
    group=st.none() | _TEXT,
    extra=st.dictionaries(st.sampled_from(["source", "note"]), st.integers() | _TEXT),
)


@given(st.lists(_EXAMPLES, min_size=1, max_size=4, unique_by=lambda x: x.id))
def test_written_examples_read_back_equal(tmp_path_factory, examples):
    path = tmp_path_factory.mktemp("round") / "out.jsonl"
    write_jsonl(path, examples)
    assert read_jsonl(path) == examples


def test_written_images_are_relative_to_the_root(tmp_path):
    (tmp_path / "sub").mkdir()
    inside = save_image(tmp_path / "sub" / "x.png", 8, 8)
    examples = [StepExample("a", "q", (inside,), (Step("s"),))]
    write_jsonl(tmp_path / "out.jsonl", examples)
    assert json.loads((tmp_path / "out.jsonl").read_text())["images"] == ["sub/x.png"]
    assert read_jsonl(tmp_path / "out.jsonl") == examples


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"extra": {"group": "g"}}, "reads back"),
        ({"extra": {"lable": 1}}, ""),
        ({"extra": {"note": float("nan")}}, "JSON"),
        ({"extra": {"note": {1, 2}}}, "JSON"),
        ({"id": "first"}, "no other example"),
        ({"steps": ()}, "at least one step"),
        ({"steps": (Step("s", 2.0),)}, "[0, 1]"),
    ],
)
def test_nothing_is_written_that_cannot_be_read(tmp_path, change, words):
    path = tmp_path / "out.jsonl"
    path.write_text("as it was")
    good = StepExample("first", "q", (), (Step("s"),))
    bad = StepExample(**{"id": "b", "question": "q", "images": (), "steps": good.steps, **change})
    if change == {"extra": {"lable": 1}}:
        write_jsonl(path, [good, bad])  # only a near miss of a step's field: kept at the top level
        assert read_jsonl(path) == [good, bad]
        return
    with pytest.raises(DataError) as caught:
        write_jsonl(path, [good, bad])
    assert words in str(caught.value)
    assert caught.value.line == 2
    assert path.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [path]


def test_data_error_survives_pickling():
    with pytest.raises(DataError) as caught:
        parse(3, Location(Path("."), Path("f"), 7))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert copy.line == 7


def test_a_long_finding_is_shown_without_its_middle():
    error = DataError(expected="a file", found="begin" + "x" * 10**5 + "end", line=3, file="f")
    assert str(error).startswith("f:3: expected a file, found beginxxx")
    assert str(error).endswith("xxxend")
    assert len(str(error)) < 1_100
    assert len(error.found) > 10**5
