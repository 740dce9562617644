"""A row that says one thing twice is refused with both fields, or read if these agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prm.data.reader import iter_rows
from prm.schema import DataError
from tests.prm.data.formats.good_records import GOOD


def read(folder: Path, record: dict):
    """The only row of a file with a record, or its error."""
    path = folder / "data.jsonl"
    path.write_text(json.dumps(record), encoding="utf-8")
    (row,) = iter_rows(path)
    return row


def raw(**more) -> dict:
    step = {"step": "s", "score": 0.5, "num_mc_correct": 4, "num_mc_total": 8}
    return {"question": "q", "steps_with_score": [step | more]}


GAME = {"input": "1+1? Step 1: 2 ки\nStep 2: 3 ки", "value": [1.0, 0.25]}

# name: record, field of the refusal, what the message names of the two
CONTRADICTIONS = {
    "two names of outcomes": (
        GOOD["rlhflow-candidates"] | {"labels": [0, 1]},
        "labels", ["'label'", "[0, 1]", "[1, 0]"],
    ),
    "two names of labels": (
        GOOD["openr"] | {"labels": ["-", "-"]}, "label[0]", ["'labels'", "'-'"],
    ),
    "value and labels": (GAME | {"labels": [0.9, 0.75]}, "labels[1]", ["'value'", "0.25", "0.75"]),
    "two names of the text": (GAME | {"text": "other"}, "text", ["'input'", "1+1?", "'other'"]),
    "share and counts": (
        raw(score=0.9),
        "steps_with_score[0].score", ["num_mc_correct / steps_with_score[0].num_mc_total", "4 / 8"],
    ),
    "accuracy and counts": (
        GOOD["dreamprm-train"] | {"accuracy": 0.7}, "accuracy", ["score / times, 7 / 11", "0.7"],
    ),
    "a count beyond all floats": (
        GOOD["dreamprm-train"] | {"score": 10**400},
        "accuracy", ["score / times, 1000", "... / 11"],
    ),
    "a total beyond all floats": (
        raw(num_mc_total=10**400), "steps_with_score[0].score", ["num_mc_total, 4 / 1000", "0.5"],
    ),
    "label beside labels": (
        GOOD["stepwise"] | {"label": [True, True, None, None]},
        "label[1]", ["'labels'", "'-'", "true"],
    ),
    "labels beside the first error": (
        GOOD["processbench"] | {"labels": [1, 1, 1]}, "labels[1]", ["'label'", "'-'", "number 1"],
    ),
    "labels beside turns": (
        GOOD["visualprm"] | {"labels": [0, 1]}, "labels[0]", ["'conversations'", "'+'"],
    ),
    "labels beside numbers of steps": (
        GOOD["prmbench"] | {"labels": [0] * len(GOOD["prmbench"]["modified_process"])},
        "labels[0]", ["'error_steps'", "'+'"],
    ),
    "too few labels": (GOOD["processbench"] | {"labels": [1]}, "labels", ["1 for 3 steps"]),
    "labels that nobody reads": (
        GOOD["stepwise"] | {"labels": None, "label": [1, 0, 1, 1]}, "label", ["would not be read"],
    ),
    "first error": (GOOD["processbench"] | {"first_error": 1}, "first_error", ["first_error 1"]),
    "two outcomes": (
        GOOD["dreamprm-meta"] | {"correct": False},
        "correct", ["'true_false', true", "found false"],
    ),
    "an outcome that was computed": (
        GOOD["big-bench-mistake"] | {"answer": "x", "target": "x", "correct": False},
        "correct", ["'the other fields', true"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("record", "field", "named"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_two_fields_that_contradict_each_other_are_refused_by_name(tmp_path, record, field, named):
    error = read(tmp_path, record)
    assert isinstance(error, DataError)
    assert error.field == field
    for words in named:
        assert words in str(error), error


AGREEING = {
    "outcomes": GOOD["rlhflow-candidates"] | {"labels": [True, False]},
    "labels": GOOD["openr"] | {"labels": [1, 0]},
    "texts": GAME | {"text": GAME["input"]},
    "null beside a value": GAME | {"text": None, "labels": None},
    "rounded share": raw(score=0.667, num_mc_correct=2, num_mc_total=3),
    "rounded accuracy": GOOD["dreamprm-train"] | {"accuracy": 0.64},
    "a share of nothing": raw(num_mc_correct=0, num_mc_total=0),
    "a share without counts": GOOD["dreamprm-train"] | {"times": None},
    "a threshold of soft labels": GAME | {"labels": [1, 1]},
    "labels behind the first error": GOOD["processbench"] | {"labels": [1, 0, 1]},
    "labels of a topic": GOOD["processbench"] | {"labels": ["geometry"]},
    "first error": GOOD["processbench"] | {"first_error": 2},
    "outcomes twice": GOOD["dreamprm-meta"] | {"correct": True, "outcome_correct": None},
    "an outcome of one of several": GOOD["rlhflow-candidates"] | {"correct": False},
}


@pytest.mark.parametrize("record", AGREEING.values(), ids=AGREEING)
def test_what_agrees_is_read(tmp_path, record):
    row = read(tmp_path, record)
    assert not isinstance(row, DataError), row


def test_one_candidate_has_no_labels_of_steps(tmp_path):
    row = read(tmp_path, {"prompt": "q", "answers": ["a\n\nb\n\nc"], "label": [1], "labels": [1]})
    assert [example.correct for example in row.examples] == [True]
