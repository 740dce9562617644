"""Rows of JSONL files and JSON arrays come out one by one, as ``json`` would read them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prm.data import json_rows as module
from prm.data.json_rows import json_rows
from prm.schema import DataError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.lists(VALUES, max_size=6),
    st.integers(1, 40),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.sampled_from(["", " ", "\r\n", "\n\t "]),
)
def test_an_array_is_read_in_any_pieces(tmp_path_factory, values, chunk, indent, ascii, space):
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    text = json.dumps(values, indent=indent, ensure_ascii=ascii)
    path.write_bytes((space + text + space).encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        try:
            text.encode()
        except UnicodeEncodeError:
            assert any(isinstance(value, DataError) for _, value in json_rows(path))
            return
        assert list(json_rows(path)) == list(enumerate(values, start=1))


NUMBERS = ["0.0", "-0", "-0.0", "10", "1.25", "1e5", "1E5", "1e+5", "1e-5", "-12.5e-10", "7"]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("behind", ["", " ", "\n", ", {}"])
@pytest.mark.parametrize("before", ["", "null,", '{"a": 1},', '{"a": '])
def test_a_number_cut_by_the_buffer_is_read_to_its_end(
    tmp_path, monkeypatch, number, behind, before
):
    """Every cut: "0" and "0." of "0.0", "1", "1e" and "1e-" of "1e-5", "-" of "-0"."""
    path = tmp_path / "rows.json"
    text = f"[{before}{number}{'}' if before.endswith(': ') else ''}{behind}]"
    path.write_text(text)
    expected = list(enumerate(json.loads(text), start=1))
    for chunk in range(1, len(text) + 1):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        rows = list(json_rows(path))
        assert rows == expected
        assert [repr(value) for _, value in rows] == [repr(value) for _, value in expected]


@pytest.mark.parametrize("chunk", [1, 2, 5, 4400, 2**20])
def test_numbers_too_large_to_read_do_not_end_an_array(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    path = tmp_path / "rows.json"
    digits = "1" * 4500
    path.write_text(f"[{digits}, 1e999, {digits}e-4500, {digits}.5, 2]")
    rows = [value for _, value in json_rows(path)]
    assert [value.found for value in rows[:2]] == ["a whole number of 4,500 digits", "1e999"]
    assert rows[2] == float(f"{digits}e-4500")
    assert isinstance(rows[3], DataError)
    assert rows[4] == 2


@given(st.lists(VALUES, max_size=6))
def test_lines(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    # A file whose first line is a list is an array, so lead with an object.
    values = [{}, *values]
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    assert list(json_rows(path)) == list(enumerate(values, start=1))


def test_an_error_at_the_end_of_a_line_is_told_at_its_column(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"id": "b", "question":\n{"a": 2}\n', encoding="utf-8")
    rows = dict(json_rows(path))
    assert rows[1] == {"a": 1}
    assert "Expecting value at column 24" in str(rows[2])


BROKEN = {
    "cut off": ('[{"a": 1}, {"a"', 2, "JSON", "Expecting ':'"),
    "cut off in a string": ('[{"a": 1}, {"a": "x', 2, "JSON", "Unterminated string"),
    "no end": ('[{"a": 1}', 1, "',' or ']' behind the row", "the end of the file"),
    "no comma": ('[{"a": 1} {"b": 2}]', 1, "',' or ']' behind the row", "'{'"),
    "trailing comma": ('[{"a": 1},]', 2, "JSON", "Expecting value"),
    "behind the array": ('[{"a": 1}] {}', 1, "nothing behind the array", "'{'"),
    "single quotes": ("[{'a': 1}]", 1, "JSON", "Expecting property name"),
    "only a bracket": ("[", 1, "JSON", "Expecting value"),
}


@pytest.mark.parametrize("chunk", [1, 3, 2**20])
@pytest.mark.parametrize(("text", "row", "expected", "found"), BROKEN.values(), ids=BROKEN)
def test_broken_arrays(tmp_path, monkeypatch, chunk, text, row, expected, found):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    path = tmp_path / "rows.json"
    path.write_text(text)
    *_, (last, error) = json_rows(path)
    assert isinstance(error, DataError)
    assert (error.file, last, error.line) == (path, row, row)
    assert expected in error.expected
    assert found in error.found


def test_values_that_are_json_but_refused_do_not_end_an_array(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"a": NaN}, {"a": 1, "a": 2}, {"a": 1e999}, {"a": 3}]')
    rows = list(json_rows(path))
    assert [row for row, _ in rows] == [1, 2, 3, 4]
    found = [value.found for _, value in rows[:3]]
    assert found == ["NaN", "'a' twice in one object", "1e999"]
    assert rows[3][1] == {"a": 3}


def test_broken_lines_do_not_end_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a"\n\n\xff\n{"a": 2}\n')
    rows = list(json_rows(path))
    assert [value.expected for _, value in rows[1:4]] == ["JSON", "a JSON object", "UTF-8"]
    assert [value.line for _, value in rows[1:4]] == [2, 3, 4]
    assert (rows[0], rows[4]) == ((1, {"a": 1}), (5, {"a": 2}))


def test_a_string_that_does_not_end_is_not_read_to_the_end_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 64)
    monkeypatch.setattr(module, "_LARGEST_ROW", 200)
    path = tmp_path / "rows.json"
    path.write_text('[{"a": "' + "x" * 5000)
    ((row, error),) = json_rows(path)
    assert (row, error.expected) == (1, "rows of at most 200 characters")


def test_a_line_that_is_too_long_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 64)
    monkeypatch.setattr(module, "_LARGEST_ROW", 200)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "' + "x" * 5000 + '"}\n{"a": 1}\n' + "{" * 300)
    (_, first), second, (_, last) = json_rows(path)
    assert second == (2, {"a": 1})
    assert (first.line, first.expected) == (1, "rows of at most 200 characters")
    assert (last.line, last.expected) == (3, "rows of at most 200 characters")


@pytest.mark.parametrize("array", [False, True])
def test_halves_of_characters_are_named_and_whole_ones_read(tmp_path, array):
    rows = ['{"a": "\\ud83d\\uDE00"}', '{"b": [{"c": "\\uD83D x"}]}', '{"\\ude00": 1}', '{"d": 1}']
    path = tmp_path / "rows"
    path.write_text(f"[{','.join(rows)}]" if array else "\n".join(rows))
    (_, good), (_, value), (_, key), (_, last) = json_rows(path)
    assert (good, last) == ({"a": "\N{GRINNING FACE}"}, {"d": 1})
    assert (value.line, value.field) == (2, "b[0].c")
    assert value.found == "a lone surrogate in '\\ud83d x'"
    assert (key.line, key.found) == (3, "a lone surrogate in '\\ude00'")


ZEROS = {
    "one in a string": (b'{"a": "x\0y"}', "a zero byte (NUL) at column 9", r"\u0000"),
    "one behind a key": (b'{"a":\0 1}', "a zero byte (NUL) at column 6", "remove it"),
    "a row of them": (b"\0" * 512, "512 zero bytes (NUL) at column 1", "write or copy the file"),
    "some behind a row": (b'{"a": 1}\0\0\0', "3 zero bytes (NUL) at column 9", "cut off"),
    "another control character": (
        b'{"a": "x\x07y"}', r"the control character '\x07' at column 9", r"\u0007",
    ),
    "a tab": (b'{"a": "x\ty"}', r"the control character '\t' at column 9", r"write it as \t in"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "first"),
    # A file that starts with zero bytes is no text at all: see the containers.
    [
        (name, first)
        for name in ZEROS
        for first in (True, False)
        if not (first and "row of" in name)
    ],
)
def test_bytes_that_nobody_sees_are_named_at_their_column(tmp_path, name, first):
    raw, found, remedy = ZEROS[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes((b"" if first else b'{"a": 0}\n') + raw + b'\n{"b": 2}\n')
    *_, (line, error), last = json_rows(path)
    assert (line, error.line, error.expected) == (2 - first, 2 - first, "JSON")
    assert error.found == found
    assert remedy in error.remedy
    assert last == (3 - first, {"b": 2})


@pytest.mark.parametrize(
    ("raw", "row", "found"),
    [
        (b'[{"a": 1}, {"a": "x\0y"}]', 2, "a zero byte (NUL) at character 9 of the row"),
        (b'[{"a": 1}\0\0\0', 1, "a zero byte (NUL)"),
        (b'[{"a": 1}, \0\0\0', 2, "3 zero bytes (NUL) at character 1 of the row"),
        (b'[{"a": 1}, {"a": "x\ny"}]', 2, r"the control character '\n' at character 9 of the row"),
        (b'{"a":\n"x\0y"}', 1, "a zero byte (NUL) at character 9 of the row"),
    ],
)
def test_they_are_named_in_an_array_and_in_objects_over_several_lines(tmp_path, raw, row, found):
    path = tmp_path / "rows.json"
    path.write_bytes(raw)
    *_, (last, error) = json_rows(path)
    assert (last, error.line, error.found) == (row, row, found)


def test_invalid_utf8_in_an_array_is_named(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"a": "\xff"}]')
    ((_, error),) = json_rows(path)
    assert error.expected == "UTF-8"
    assert "byte 8" in error.found


def test_rows_that_end_in_carriage_returns_alone_are_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"a": 1}\r{"a": 2}\r')
    ((line, error),) = json_rows(path)
    assert (line, error.expected) == (1, "one JSON object per line")
    assert "carriage return" in error.found
    assert "line feeds" in error.remedy
