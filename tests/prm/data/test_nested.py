"""Rows inside one object are read, or the error says where they are and how to get at them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prm.data.bad_rows import BadRows
from prm.data.reader import checked_rows, iter_rows
from prm.data.store.examples import store_examples
from prm.schema import DataError
from tests.prm.data.formats.good_records import GOOD

ROWS = [
    {"id": name, "question": f"how many {name}?", "steps": [{"text": "two", "label": "+"}]}
    for name in "abc"
]


def write(folder: Path, content: object) -> Path:
    path = folder / "nested.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def refused(path: Path, **more) -> DataError:
    (error,) = iter_rows(path, **more)
    assert isinstance(error, DataError)
    assert (error.file, error.line, error.field) == (path, 1, None)
    assert len(str(error)) < 400  # not the list of all formats
    return error


@pytest.mark.parametrize(
    "beside", [{"version": "1.1"}, {"info": {"n": 3}, "names": ["x"], "none": []}]
)
def test_the_one_list_of_records_beside_other_fields_is_read_with_a_note(tmp_path, beside):
    path = write(tmp_path, beside | {"data": ROWS})
    notes: list[str] = []
    found = list(iter_rows(path, tell=notes.append))
    assert [(row.line, row.examples[0].id) for row in found] == [(1, "a"), (2, "b"), (3, "c")]
    others = ", ".join(map(repr, beside))
    assert notes == [f"{path}: the rows of 'data' are read; {others} beside them are not"]
    told: list[str] = []
    assert len(list(checked_rows(path, bad_rows=BadRows(path, tell=told.append)))) == 3
    assert told == notes
    stored, _ = store_examples(path)
    assert [example.id for example in stored] == ["a", "b", "c"]


def test_without_other_fields_there_is_nothing_to_note(tmp_path):
    notes: list[str] = []
    assert len(list(iter_rows(write(tmp_path, {"u": ROWS, "v": []}), tell=notes.append))) == 3
    assert not notes


def test_several_lists_that_become_one_set_are_noted(tmp_path):
    path, notes = write(tmp_path, {"u": ROWS[:1], "v": ROWS[1:], "w": []}), []
    assert len(list(iter_rows(path, tell=notes.append))) == 3
    assert notes == [f"{path}: the rows of 2 lists ('u', 'v') are read as one set"]


@pytest.mark.parametrize("content", [{"data": []}, {"train": [], "test": []}])
def test_lists_without_rows_are_named(tmp_path, content):
    error = refused(write(tmp_path, content))
    assert error.expected == "at least one row"
    assert error.found == f"empty lists ({', '.join(map(repr, content))})"


INSIDE = {
    "a division": ({"train": ROWS, "Test": ROWS[:1]}, ".train[], .Test[]", ".train[]"),
    "two sets": ({"train": ROWS, "test": ROWS[:1], "version": 1}, ".train[], .test[]", ".train[]"),
    "deeper": ({"data": {"rows": ROWS}, "version": 1}, ".data.rows[]", ".data.rows[]"),
    "as the Hub's server answers": (
        {
            "features": [{"name": "id"}],
            "rows": [{"row_idx": n, "row": row} for n, row in enumerate(ROWS)],
            "num_rows_total": 3,
        },
        ".rows[].row",
        ".rows[].row",
    ),
    "in paragraphs": (
        {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"qas": ROWS}]}]},
        ".data[].paragraphs[].qas[]",
        ".data[].paragraphs[].qas[]",
    ),
    "by their names": ({row["id"]: row for row in ROWS}, ".[]", ".[]"),
    "under a name that jq quotes": ({"my rows": {"x": ROWS}}, '.["my rows"].x[]', "my rows"),
}


@pytest.mark.parametrize(("content", "where", "taken"), INSIDE.values(), ids=INSIDE)
def test_rows_elsewhere_in_an_object_are_located(tmp_path, content, where, taken):
    error = refused(write(tmp_path, content))
    assert error.expected == "one JSON object per row"
    assert error.found == f"one object with rows at {where}"
    assert taken in error.remedy
    assert "jq -c" in error.remedy


def table_like(orient: str) -> object:
    """What pandas' to_json writes of a table with two rows, by its documentation."""
    names = list(ROWS[0])
    numbered = {str(n): row for n, row in enumerate(ROWS)}
    return {
        "columns": {name: {n: row[name] for n, row in numbered.items()} for name in names},
        "index": numbered,
        "split": {
            "columns": names,
            "index": [0, 1, 2],
            "data": [[row[name] for name in names] for row in ROWS],
        },
        "lists": {name: [row[name] for row in ROWS] for name in names},
    }[orient]


@pytest.mark.parametrize(
    ("orient", "found"),
    [
        ("columns", "an object of columns, as pandas' to_json writes a table by default"),
        ("index", "an object of rows by number, as pandas' to_json(orient='index')"),
        ("split", "column names and values apart, as pandas' to_json(orient='split')"),
        ("lists", "an object of 3 columns of 3 values each"),
    ],
)
@pytest.mark.parametrize("format", ["auto", "prm-jsonl"])
def test_a_table_by_columns_is_named_with_its_remedy(tmp_path, orient, found, format):
    error = refused(write(tmp_path, table_like(orient)), format=format)
    assert error.found.startswith(found)
    assert "orient='records', lines=True" in error.remedy


def test_of_several_objects_each_is_refused_and_none_read(tmp_path):
    path = tmp_path / "nested.jsonl"
    holders = [{"topic": n, "rows": ROWS} for n in range(2)]
    path.write_text("".join(json.dumps(one) + "\n" for one in [*holders, ROWS[0]]))
    first, second, row = iter_rows(path)
    for line, error in enumerate((first, second), start=1):
        assert (error.line, error.found) == (line, "one object with rows at .rows[]")
    assert (row.line, row.format) == (3, "prm-jsonl")


def test_a_table_with_an_index_of_names_is_named_too(tmp_path):
    names = list(ROWS[0])
    content = {name: {row["id"]: row[name] for row in ROWS} for name in names}
    assert refused(write(tmp_path, content)).found.startswith("an object of columns")


@pytest.mark.parametrize("name", GOOD)
def test_a_record_of_a_known_format_stays_one(tmp_path, name):
    (row,) = iter_rows(write(tmp_path, GOOD[name]))
    assert (row.line, row.format) == (1, name)


def test_an_object_of_unknown_objects_says_what_they_have(tmp_path):
    (error,) = iter_rows(write(tmp_path, {"version": 1, "data": [{"a": 1, "b": 2}, {"a": 3}]}))
    assert error.found == "the keys 'version', 'data'; 'data' holds 2 objects with 'a', 'b'"
