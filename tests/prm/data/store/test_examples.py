"""Stored examples: equal to those that are read at once, whatever the file, and small."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import pickle
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from prm.batches.workers import ordered_map
from prm.data.bad_rows import BadRows
from prm.data.reader import iter_rows, read_examples, read_rows
from prm.data.store.examples import StoredExamples, facts, store_examples
from prm.data.store.outline import facts_of
from prm.schema import DataError, StepExample
from tests.prm.data.formats.good_records import GOOD
from tests.prm.data.packings import PACKED, ROWS, TEXTS, table_file


def stored(path: Path, **more) -> StoredExamples:
    examples, faults = store_examples(path, **more)
    assert faults == []
    return examples


def check(found: StoredExamples, expected: list[StepExample], lines: list[int]) -> None:
    """By every way of access, and after pickling."""
    for examples in (found, pickle.loads(pickle.dumps(found))):
        assert list(examples) == expected
        assert [examples[row] for row in range(-len(expected), 0)] == expected
        assert examples[1:] == expected[1:]
        assert examples[::-1] == expected[::-1]
        order = [*range(len(expected)), *reversed(range(len(expected)))]
        assert examples.at(order) == [expected[row] for row in order]
        assert list(examples.facts) == list(map(facts_of, expected))
        assert list(examples.ids) == [example.id for example in expected]
        assert list(examples.lines) == lines
        assert len(examples) == len(expected)


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("pack", ["JSONL", "gz"])
def test_every_format(tmp_path, name, pack):
    """Several records of one format, among them some with several candidates."""
    path = tmp_path / "rows"
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    records = [GOOD[name] | ({"id": f"{n}"} if "id" in GOOD[name] else {}) for n in range(3)]
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(text) if pack == "gz" else text)
    bad = BadRows(path, "skip", 1.0), BadRows(path, "skip", 1.0)
    expected, lines = read_rows(path, format=name, bad_rows=bad[0])
    found, _ = store_examples(path, format=name, bad_rows=bad[1])
    check(found, expected, lines)
    assert bad[0].left_out == bad[1].left_out
    images = [image for example in expected for image in example.images]
    assert list(found.pictures) == [image for image in images if image.name == "x.png"]


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("pack", [bytes, *PACKED.values()], ids=["plain", *PACKED])
def test_every_packing(tmp_path, text, pack):
    path = tmp_path / "rows"
    path.write_bytes(pack(text))
    expected = read_examples(path)
    check(stored(path), expected, list(range(1, len(ROWS) + 1)))


@pytest.mark.parametrize("kind", ["parquet", "arrow file", "arrow stream"])
def test_tables_with_pictures_as_bytes(tmp_path, kind):
    picture = tmp_path / "x.png"
    Image.new("RGB", (8, 8)).save(picture)
    rows = [
        row | {"images": [{"bytes": picture.read_bytes(), "path": "x.png"}], "seen": b"\x00\xff"}
        for row in ROWS
    ]
    path = table_file(tmp_path / "rows", rows, kind)
    expected = read_examples(path, check_images="decode")
    assert expected[0].extra["seen"] == {"bytes": b"\x00\xff", "path": None}
    found = stored(path, check_images="decode")
    check(found, expected, list(range(1, len(ROWS) + 1)))
    assert list(found.pictures) == []


def test_one_object_that_holds_lists_of_records(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"a": ROWS[:3], "b": ROWS[3:9]}) + "\n")
    check(stored(path), read_examples(path), list(range(1, 10)))
    with path.open("a") as file:  # and a row behind it
        file.write(json.dumps(ROWS[20]) + "\n")
    assert [example.id for example in stored(path)] == [f"r{n}" for n in (*range(9), 20)]


def candidates(number: int, texts: list[str]) -> dict:
    return {"question": f"q{number}", "candidates": texts, "true_false": [True] * len(texts)}


def test_candidates_that_are_left_out_do_not_shift_the_others(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [candidates(0, ["1. a", "", "1. c"]), candidates(1, ["", "1. e", "1. f"])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected, lines = read_rows(path, bad_rows=BadRows(path, "skip", 1.0))
    assert [example.steps[0].text[-1] for example in expected] == ["a", "c", "e", "f"]
    found, _ = store_examples(path, bad_rows=BadRows(path, "skip", 1.0))
    check(found, expected, lines)


def test_some_of_the_examples(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(TEXTS["JSONL"])
    expected = read_examples(path)
    some = stored(path).only(range(0, 300, 3))
    check(some, expected[::3], list(range(1, 301, 3)))
    fewer = some.only([4, 2])
    check(fewer, [expected[12], expected[6]], [13, 7])
    assert dict(fewer.index()) == {"r12": 0, "r6": 1}
    assert list(fewer.index()) == ["r12", "r6"]
    assert "r0" not in fewer.index()
    assert fewer.index().get("x") is None
    assert dict(some.index()) == {example.id: row for row, example in enumerate(expected[::3])}


def test_two_examples_of_one_id_have_no_index(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(TEXTS["JSONL"])
    with pytest.raises(ValueError, match="id 'r5' occurs in rows 0 and 1; ids must be unique"):
        stored(path).only([5, 5]).index()


def test_faults_of_a_check_are_given_with_their_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(TEXTS["JSONL"])
    seen = []

    def odd(examples):
        seen.extend(examples)
        return [
            DataError(expected="even", found=one.id) if int(one.id[1:]) % 100 == 99 else None
            for one in examples
        ]

    _, faults = store_examples(path, check=odd)
    assert seen == read_examples(path)
    assert [(row, error.found) for row, error in faults] == [(n, f"r{n}") for n in (99, 199, 299)]


def test_facts_of_examples_in_memory_are_those_of_stored_ones(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = ROWS[0] | {"domain": "d", "group": "g", "answer": "", "correct": False}
    steps = [{"text": "a", "label": label} for label in ("+", 0.1, None, [1, 3], "-")]
    path.write_text(json.dumps(row | {"steps": steps}) + "\n" + json.dumps(ROWS[1]) + "\n")
    found = list(facts(stored(path)))
    assert found == list(facts(read_examples(path)))
    assert found[0] == ("r0", "d", "g", "", False, (1.0, 0.1, None, 1 / 3, 0.0))
    assert found[1][1:5] == (None, None, None, None)
    assert found[0].labelled
    assert not replace(read_examples(path)[0], steps=()).steps
    assert not found[0]._replace(labels=(None, None)).labelled


@pytest.mark.parametrize("pack", ["JSONL", "gz"])
def test_worker_processes_read_by_themselves(tmp_path, pack):
    path = tmp_path / "rows"
    path.write_bytes(TEXTS["JSONL"] if pack == "JSONL" else gzip.compress(TEXTS["JSONL"]))
    found, expected = stored(path), read_examples(path)
    batches = [[n, 299 - n, (7 * n) % 300] for n in range(60)]
    read = ordered_map(lambda number: found.at(batches[number]), range(60), workers=2)
    assert list(read) == [[expected[row] for row in batch] for batch in batches]


CHANGES = {
    "one character": lambda path: path.write_bytes(
        path.read_bytes().replace(b'"s 7", "label": "+"', b'"s 7", "label": "-"')
    ),
    "a row in front": lambda path: path.write_bytes(b"\n" + path.read_bytes()),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:500]),
    "another file in its place": lambda path: (
        path.with_name("new").write_bytes(path.read_bytes().replace(b"s 7", b"s 8"))
        and path.with_name("new").replace(path)
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_changes_is_named_with_the_line(tmp_path, change, workers):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(TEXTS["JSONL"])
    found = stored(path)
    change(path)
    with pytest.raises(DataError, match=r"rows.jsonl:8: expected the row that was there") as caught:
        list(ordered_map(lambda row: found[row], [7], workers))
    assert "do not change a data file while a command uses it" in str(caught.value)


def test_a_row_that_did_not_change_is_still_read(tmp_path):
    """A file that grows, or is copied, remains what it was."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(TEXTS["JSONL"])
    found, expected = stored(path), read_examples(path)
    path.write_bytes(TEXTS["JSONL"] + b'{"id": "more"}\n')
    assert list(found) == expected


def test_a_file_that_is_gone_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(TEXTS["JSONL"])
    found = stored(path)
    path.unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl: expected .* found No such file"):
        found[0]


def test_a_copy_of_a_packed_file_needs_it_no_more(tmp_path):
    path = tmp_path / "rows.gz"
    path.write_bytes(gzip.compress(TEXTS["JSONL"]))
    found, expected = stored(path), read_examples(path)
    path.unlink()
    assert list(found) == expected


def test_a_full_disk_for_the_copy_is_named(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, raw):
            if raw:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return 0

    path = tmp_path / "rows.gz"
    path.write_bytes(gzip.compress(TEXTS["JSONL"]))
    monkeypatch.setattr("prm.data.store.sources.tempfile.TemporaryFile", Full)
    with pytest.raises(OSError, match=r"No space left .*TMPDIR names another folder") as e:
        store_examples(path)
    assert e.value.filename == tempfile.gettempdir()


def long_rows(path: Path, rows: int) -> Path:
    with path.open("w") as file:
        for number in range(rows):
            steps = [{"text": "x" * 300, "label": "+"}] * 5
            row = {"id": f"row-{number:06}", "question": f"{number} " * 50, "domain": "d"}
            file.write(json.dumps(row | {"steps": steps}) + "\n")
    return path


@pytest.mark.parametrize("pack", ["JSONL", "gz"])
def test_a_row_takes_a_hundred_bytes_and_not_its_own_size(tmp_path, pack):
    """Rows of some 2,000 bytes; memory that 3,000 more of them take, when all have been read."""
    held = {}
    for rows in (1_000, 4_000):
        path = long_rows(tmp_path / "rows.jsonl", rows)
        if pack == "gz":
            path.write_bytes(gzip.compress(path.read_bytes(), 1))
        stored(path)  # what is loaded once
        tracemalloc.start()
        try:
            found = stored(path)
            assert sum(1 for _ in found) == rows
            held[rows], peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak - held[rows] < 3e6  # some hundred rows at once, and the table that grows
    assert 50 < (held[4_000] - held[1_000]) / 3_000 < 200


def test_spans_are_where_the_lines_are(tmp_path):
    path = tmp_path / "rows.jsonl"
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + TEXTS["JSONL"].replace(b"\n", b"\r\n", 5))
        content = path.read_bytes()
        for row in iter_rows(path):
            assert row.span is not None
            line = content[row.span.start : row.span.start + row.span.size]
            assert json.loads(line.removeprefix(mark) or b"0") == row.record
            assert line.endswith(b"\n")
