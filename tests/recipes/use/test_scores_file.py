"""Scores files: read back exactly, continued after the last complete line, mistakes named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prm.digests import digest_path, write_digest
from prm.schema import DataError
from recipes.options.values import OptionError
from recipes.use.scores_file import (
    ScoredSolution,
    complete_lines,
    read_scores,
    scores_for,
    settings_path,
)

ROWS = [
    ScoredSolution("a", (0.1, 1 / 3), {"mean": 13 / 60, "min": 0.1}, "q", "7", True),
    ScoredSolution("b", (1.0,), {"mean": 1.0, "min": 1.0}, "q", "", False),
    ScoredSolution("ç", (0.0, 2**-149), {"mean": 2**-150, "min": 0.0}),
]


@pytest.fixture
def path(tmp_path) -> Path:
    file = tmp_path / "scores.jsonl"
    file.write_text("".join(row.line() for row in ROWS), encoding="utf-8")
    return file


def test_lines_read_back_as_they_were(path):
    assert read_scores(path) == ROWS
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[2]) == {
        "id": "ç", "step_scores": [0.0, 2**-149], "scores": {"mean": 2**-150, "min": 0.0}
    }  # fmt: skip


def test_scores_come_with_the_rows_of_the_data(path):
    found = dict(scores_for(path, {"ç": 0, "a": 1, "b": 2}, Path("data")))
    assert found == {0: ROWS[2], 1: ROWS[0], 2: ROWS[1]}
    with pytest.raises(DataError, match=r"3 .*none for 1 of them .*'d'\), and 1 of other sol"):
        list(scores_for(path, {"a": 0, "b": 1, "d": 2}, Path("data")))
    with pytest.raises(DataError, match="none for 0 of them, and 2 of other solutions"):
        list(scores_for(path, {"a": 0}, Path("data")))


@pytest.mark.parametrize("rest", ["", '{"id": "d", "step_sc', "{", "\x00"])
def test_an_incomplete_last_line_is_cut_off(path, rest):
    whole = path.read_bytes()
    path.write_bytes(whole + rest.encode())
    assert complete_lines(path, ["a", "b", "ç", "d"], Path("data")) == 3
    assert path.read_bytes() == whole


@pytest.fixture
def complete(path) -> Path:
    """A complete file, with all that ``score`` writes beside it."""
    settings_path(path).write_text(json.dumps({"solutions": len(ROWS)}))
    write_digest(path)
    return path


def test_a_complete_file_is_read_without_a_note_and_an_old_one_with_it(complete, capsys):
    assert read_scores(complete) == ROWS
    assert capsys.readouterr().err == ""
    settings_path(complete).unlink()
    digest_path(complete).unlink()
    assert read_scores(complete) == ROWS
    said = f"note: {complete}: no scores.jsonl.sha256 beside it to check it with\n"
    assert capsys.readouterr().err == said
    settings_path(complete).write_text("{}")  # of a version that counted nothing
    assert read_scores(complete) == ROWS
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("there", [0, 1, 2, 3])
def test_an_unfinished_file_is_refused(complete, there):
    """The third is all there, but ``score`` was stopped before it said so."""
    digest_path(complete).unlink()
    complete.write_text("".join(row.line() for row in ROWS[:there]))
    with pytest.raises(DataError, match=f"scores of 3 solutions.*, found {there}, without") as said:
        read_scores(complete)
    assert "call `bilevel-prm score` again as before: it goes on" in str(said.value)


def test_every_flipped_bit_of_a_complete_file_is_noticed(complete):
    content = complete.read_bytes()
    for place in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        complete.write_bytes(flipped)
        with pytest.raises(DataError, match="changed after it was written, or is damaged"):
            read_scores(complete)


def test_a_file_of_other_solutions_is_not_continued(path):
    with pytest.raises(DataError, match=r":2: field id: expected the scores of 'x', by the order"):
        complete_lines(path, ["a", "x", "ç"], Path("data"))
    with pytest.raises(DataError, match=r":3: field id: expected no further line"):
        complete_lines(path, ["a", "b"], Path("data"))


def broken(**change):
    return json.dumps(json.loads(ROWS[0].line()) | {"id": "z"} | change)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", r":4: expected a JSON object, found a blank line"),
        ('{"id": "z"', r":4: expected JSON, found Expecting ',' delimiter at column 11"),
        ('{"id": "z", "id": "z"}', r":4: expected every key once"),
        ('{"scores": {"\\ud800": 1}}', r":4: field scores: expected text that UTF-8 can hold"),
        ("[1]", r":4: expected a JSON object, found \[1\]"),
        (broken(id=7), r":4: field id: expected a string, found 7"),
        (broken(id="a"), r":4: field id: expected an id of its own, not that of line 1"),
        (broken(step_scores=[]), r":4: field step_scores: expected a list of at least one"),
        (broken(step_scores=[0.5, None]), r":4: field step_scores\[1\]: .* found nothing"),
        (broken(step_scores=[1.5]), r":4: field step_scores\[0\]: .*\[0, 1\], found 1.5"),
        (broken(step_scores=[float("nan")]), r":4: expected finite numbers, found NaN"),
        (broken(step_scores=[True]), r":4: field step_scores\[0\]: .* found True"),
        (broken(scores={}), r":4: field scores: expected an object"),
        (broken(scores={"min": 10**400}), r":4: field scores.min: expected a finite number"),
        (broken(scores={"min": "high"}), r":4: field scores.min: .* found 'high'"),
        (broken(group=3), r":4: field group: expected a string"),
        (broken(correct=1), r":4: field correct: expected true, false"),
    ],
)
def test_malformed_lines_are_named(path, line, message):
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=message) as caught:
        read_scores(path)
    assert str(caught.value).startswith(str(path))
    assert "bilevel-prm score" in str(caught.value)


def test_what_is_no_scores_file(tmp_path):
    with pytest.raises(OptionError, match=r"none.jsonl: no such file"):
        read_scores(tmp_path / "none.jsonl")
    (tmp_path / "empty").touch()
    with pytest.raises(DataError, match="found an empty file"):
        read_scores(tmp_path / "empty")
    (tmp_path / "bytes").write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(DataError, match="bytes:1: expected UTF-8, found byte 0xff"):
        read_scores(tmp_path / "bytes")
