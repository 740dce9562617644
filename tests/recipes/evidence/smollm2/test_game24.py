"""The files of the check: what is in them, that they share no puzzle, and what is drawn."""

from __future__ import annotations

import pytest

from prm.data.reader import read_examples
from prm.schema import DataError
from recipes.evidence.smollm2.game24 import Sizes, by_reach, split, write_parts
from tests.recipes.evidence.smollm2.puzzles import write_source
from tests.recipes.evidence.smollm2.source import source

SIZES = Sizes(test_puzzles=2, meta_puzzles=1, candidates=3, train_solutions=10)


def test_a_step_is_right_where_24_can_still_be_reached(tmp_path):
    first, second, *_ = read_examples(write_source(tmp_path / "source.jsonl"))
    assert [step.label for step in first.steps] == [1.0, 1.0]  # valid
    assert [step.label for step in by_reach(first).steps] == [0.0, 1.0]
    assert [step.label for step in by_reach(second).steps] == [1.0, 1.0]
    assert by_reach(first).steps[0].text == "move 0 of 0"
    assert (by_reach(first).id, by_reach(first).correct) == (first.id, True)


def test_reach_has_to_be_there(tmp_path):
    first, *_ = read_examples(write_source(tmp_path / "source.jsonl", reach=lambda _: None))
    with pytest.raises(DataError, match="0 or 1 as reach of every step, found"):
        by_reach(first)


def test_parts_share_no_puzzle_and_hold_what_is_said(tmp_path):
    examples = read_examples(write_source(tmp_path / "source.jsonl"))
    for seed in range(5):
        parts = split(examples, SIZES, seed)
        groups = {name: {row.group for row in rows} for name, rows in parts.items()}
        assert not groups["train"] & (groups["meta"] | groups["test"])
        assert not groups["meta"] & groups["test"]
        assert (len(groups["test"]), len(groups["meta"])) == (2, 1)
        for name in ("meta", "test"):
            for group in groups[name]:
                rows = [row for row in parts[name] if row.group == group]
                assert len({row.id for row in rows}) == 3
                assert {row.correct for row in rows} == {True, False}
        texts = [tuple(step.text for step in row.steps) for row in parts["train"]]
        assert len(set(texts)) == len(texts) == 10
        # One puzzle with right solutions, two of them, is left for training.
        assert sum(bool(row.correct) for row in parts["train"]) == 2
        assert split(examples, SIZES, seed) == parts
    assert split(examples, SIZES, 0) != split(examples, SIZES, 1)


def test_too_few_puzzles(tmp_path):
    examples = read_examples(write_source(tmp_path / "source.jsonl", puzzles=5))
    with pytest.raises(ValueError, match="more than 3 puzzles with right and wrong solutions, fou"):
        split(examples, SIZES)


def test_the_collection_itself(tmp_path):
    counts = write_parts(source(), tmp_path, Sizes())
    assert counts == {"train": 160, "meta": 80, "test": 128}
    given = {row.id: row for row in read_examples(source())}
    seen: set[str] = set()
    for name, count in counts.items():
        rows = read_examples(tmp_path / f"{name}.jsonl", format="prm-jsonl")
        assert len(rows) == count
        groups = {str(row.group) for row in rows}
        assert not groups & seen
        seen |= groups
        for row in rows:
            before = given[row.id]
            assert [step.text for step in row.steps] == [step.text for step in before.steps]
            assert [step.label for step in row.steps] == before.extra["reach"]
            assert (row.correct, row.answer, row.question) == (
                before.correct,
                before.answer,
                before.question,
            )
