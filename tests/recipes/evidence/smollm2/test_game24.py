"""The files of the comparison: what is in them, that they share no puzzle, and what is drawn."""

from __future__ import annotations

import pytest

from prm.data.reader import read_examples
from prm.schema import DataError
from recipes.evidence.smollm2.game24 import Sizes, by_reach, split, write_files
from tests.recipes.evidence.smollm2.puzzles import RIGHT, write_source
from tests.recipes.evidence.smollm2.source import source

SIZES = Sizes(
    dev_puzzles=2,
    meta_puzzles=1,
    candidates=4,
    meta_solutions=4,
    train_solutions=10,
    cold_solutions=6,
    copies=1,
)


def test_a_step_is_right_where_24_can_still_be_reached(tmp_path):
    first, second, *_ = read_examples(write_source(tmp_path / "source.jsonl"))
    assert [step.label for step in first.steps] == [1.0, 1.0]  # valid
    assert [step.label for step in by_reach(first).steps] == [0.0, 1.0]
    assert [step.label for step in by_reach(second).steps] == [1.0, 1.0]
    assert (by_reach(first).id, by_reach(first).correct) == (first.id, True)


def test_reach_has_to_be_there(tmp_path):
    first, *_ = read_examples(write_source(tmp_path / "source.jsonl", reach=lambda _: None))
    with pytest.raises(DataError, match="0 or 1 as reach of every step, found"):
        by_reach(first)


def examples_of(tmp_path, puzzles):
    path = write_source(tmp_path / "source.jsonl", puzzles=puzzles)
    return [by_reach(example) for example in read_examples(path)]


def test_parts_share_no_puzzle_and_hold_what_is_said(tmp_path):
    examples = examples_of(tmp_path, puzzles=10)
    for seed in range(4):
        parts = split(examples, SIZES, seed=seed)
        groups = {name: {row.group for row in rows} for name, rows in parts.items()}
        assert {name: len(parts[name]) for name in parts if name != "clean"} == {
            "train": 10, "cold-start": 6, "meta": 4, "dev": 8, "test": 12
        }  # fmt: skip
        learned = groups["train"] | groups["cold-start"]
        for first, second in (("meta", "dev"), ("meta", "test"), ("dev", "test")):
            assert not groups[first] & groups[second]
            assert not learned & (groups[first] | groups[second])
        for name in ("dev", "test"):
            for group in groups[name]:
                rows = [row for row in parts[name] if row.group == group]
                assert len({row.id for row in rows}) == 4
                assert {row.correct for row in rows} == {True, False}
        assert [row.correct for row in parts["meta"]] == [True, True, False, False]
        assert all(step.label is None for row in parts["meta"] for step in row.steps)
        both = parts["train"] + parts["cold-start"]
        texts = [(row.group, *(step.text for step in row.steps)) for row in both]
        assert len(set(texts)) == len({row.id for row in both}) == 16
        assert sum(bool(row.correct) for row in both) == 4  # a quarter of 16
        assert parts["clean"] == [row for row in parts["train"] if not row.extra["wrong_labels"]
                                  and row.extra["source"] == "verified"]  # fmt: skip
        assert split(examples, SIZES, seed=seed) == parts
    assert split(examples, SIZES, seed=0) != split(examples, SIZES, seed=2)


def test_two_seeds_test_every_puzzle_once_but_those_of_the_dev_set(tmp_path):
    examples = examples_of(tmp_path, puzzles=12)
    mixed = {example.group for example in examples if example.correct}
    for first in (0, 2):
        parts = [split(examples, SIZES, seed=seed) for seed in (first, first + 1)]
        tested = [{row.group for row in part["test"]} for part in parts]
        dev = {row.group for row in parts[0]["dev"]}
        assert not tested[0] & tested[1]
        assert tested[0] | tested[1] == mixed - dev
        assert parts[0]["dev"] == parts[1]["dev"] == split(examples, SIZES, seed=5)["dev"]


def test_right_texts_may_come_more_often_than_wrong_ones(tmp_path):
    examples = examples_of(tmp_path, puzzles=10)
    many = Sizes(2, 1, 4, 4, 20, 4, right=1.0, copies=3)
    parts = split(examples, many)
    right = [row for row in parts["train"] + parts["cold-start"] if row.correct]
    # Of three puzzles that are left, all right solutions, none of which is there twice.
    assert len(right) == RIGHT * 2


@pytest.mark.parametrize(
    ("puzzles", "sizes", "message"),
    [
        (7, SIZES, "at least 6 puzzles with right and wrong solutions, found 5"),
        (10, Sizes(2, 1, 4, 4, 400, 6), "at least 400 different wrong solutions of the 4 puzzles"),
    ],
)
def test_too_few(tmp_path, puzzles, sizes, message):
    with pytest.raises(ValueError, match=message):
        split(examples_of(tmp_path, puzzles), sizes)


def test_the_collection_itself(tmp_path):
    counts = write_files(source(), tmp_path / "data")
    assert counts.pop("clean") == 49
    assert counts == {"train": 160, "cold-start": 80, "meta": 48, "dev": 72, "test": 160}
    given = {row.id: row for row in read_examples(source())}
    for name in ("dev", "test", "train"):
        rows = read_examples(tmp_path / "data" / f"{name}.jsonl", format="prm-jsonl")
        for row in rows:
            before = given[row.id]
            assert [step.text for step in row.steps] == [step.text for step in before.steps]
            if name != "train" or row.extra["source"] == "verified":
                assert [step.label for step in row.steps] == before.extra["reach"]
            assert (row.correct, row.answer, row.question) == (
                before.correct,
                before.answer,
                before.question,
            )
