"""What training must not look at: who judged, what was wrong, answers, and the test set."""

from __future__ import annotations

import json

import pytest

from recipes.options.values import OptionError
from recipes.train.training import run_training
from tests.tiny_task import altered, model_bits, read_lines

WEIGHTINGS = {
    "none": {},
    "net": {},
    "table": {"bound": "clip"},
    "domain": {"bound": "softplus"},
}


def lie(place, row):
    """Every field that training has no business with, turned around."""
    return row | {
        "source": f"nobody-{place}",
        "wrong_labels": 7 - row["wrong_labels"],
        "answer": str(place % 3),
        "correct": place % 2 == 0,
        "group": f"other-{place}",
        "remark": "not a field",
    }


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_training_reads_neither_sources_nor_answers(task, tmp_path, weighting):
    more = {"weighting": weighting, **WEIGHTINGS[weighting]}
    plain = run_training(task.train(tmp_path / "plain", **more))
    lied = altered(task.data / "train.jsonl", tmp_path / "lied.jsonl", lie)
    run = run_training(task.train(tmp_path / "run", train_file=str(lied), **more))
    assert model_bits(run) == model_bits(plain)
    if weighting != "none":
        assert (run / "weights.jsonl").read_bytes() == (plain / "weights.jsonl").read_bytes()
        # The report did notice, so the fields were really altered.
        reports = [json.loads((at / "results.json").read_text())["sources"] for at in (plain, run)]
        assert set(reports[0]) == {"verified", "judge", "crowd", "guideline"}  # 9 questions
        assert set(reports[1]) == {f"nobody-{place}" for place in range(18)}


def test_labels_are_read(task, tmp_path):
    """The check above sees a difference where there is one."""

    def flip(place, row):
        row["steps"][0]["label"] = "-" if row["steps"][0]["label"] == "+" else "+"
        return row

    plain = run_training(task.train(tmp_path / "plain"))
    flipped = altered(task.data / "train.jsonl", tmp_path / "flipped.jsonl", flip)
    run = run_training(task.train(tmp_path / "run", train_file=str(flipped)))
    assert model_bits(run) != model_bits(plain)


def test_upper_level_reads_only_whether_answers_are_right(task, tmp_path):
    def label(place, row):
        for step in row["steps"]:
            step["label"] = "-"
        return row | {"answer": "0", "domain": "none", "group": f"g{place}"}

    plain = run_training(task.train(tmp_path / "plain"))
    labelled = altered(task.data / "meta.jsonl", tmp_path / "labelled.jsonl", label)
    run = run_training(task.train(tmp_path / "run", meta_file=str(labelled)))
    assert model_bits(run) == model_bits(plain)

    def wrong(place, row):
        return row | {"correct": not row["correct"]}

    upside_down = altered(task.data / "meta.jsonl", tmp_path / "wrong.jsonl", wrong)
    run = run_training(task.train(tmp_path / "other", meta_file=str(upside_down)))
    assert model_bits(run) != model_bits(plain)


def test_test_set_does_not_touch_the_model(task, tmp_path):
    with_test = run_training(task.train(tmp_path / "with"))
    without = run_training(task.train(tmp_path / "without", test_file=None))
    assert model_bits(with_test) == model_bits(without)
    assert json.loads((without / "results.json").read_text())["rows"] == {}


def test_meta_set_and_test_set_must_be_apart(task, tmp_path):
    """One shared example is enough to refuse, under another file name too."""
    rows = read_lines(task.data / "test.jsonl")

    def borrow(place, row):
        return rows[0] | {"images": row["images"]} if place == 3 else row

    shared = altered(task.data / "meta.jsonl", tmp_path / "shared.jsonl", borrow)
    said = r"shares 1 ids, for example 'test-0000-0' with --test-file"
    with pytest.raises(OptionError, match=said):
        run_training(task.train(tmp_path / "run", meta_file=str(shared)))
    assert not (tmp_path / "run").exists()
