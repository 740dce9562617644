"""prompt/completions/labels files: what is written reads back; weights join by id, exactly."""

from __future__ import annotations

import json

import pytest

from prm.data.reader import read_examples
from prm.data.stepwise_writer import read_weights, write_stepwise
from prm.schema import DataError, Step, StepExample
from tests.prm.tiny import save_image


@pytest.fixture
def examples(tmp_path):
    image = save_image(tmp_path / "sub.png", 8, 8)
    return [
        StepExample("a", "q", (image,), (Step("s", 1.0), Step("t", 0.0), Step("u"))),
        StepExample(
            "b", "r", (), (Step("s", 1.0),), domain="d", answer="4", correct=False, group="g",
            extra={"note": 1},
        ),
    ]  # fmt: skip


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows(tmp_path, examples):
    path = tmp_path / "out.jsonl"
    write_stepwise(path, examples, weights={"a": 0.5, "b": 2.0})
    assert rows(path) == [
        {
            "id": "a", "prompt": "q", "completions": ["s", "t", "u"], "labels": [True, False, None],
            "images": ["sub.png"], "weight": 0.5,
        },
        {
            "id": "b", "prompt": "r", "completions": ["s"], "labels": [True], "domain": "d",
            "group": "g", "answer": "4", "correct": False, "weight": 2.0,
        },
    ]  # fmt: skip
    first, second = read_examples(path)
    assert (first.steps, first.images) == (examples[0].steps, examples[0].images)
    assert (second.correct, second.group, second.extra) == (False, "g", {"weight": 2.0})


def test_a_column_of_labels_holds_one_kind(tmp_path, examples):
    path = tmp_path / "out.jsonl"
    write_stepwise(path, examples, soft=True)
    assert [type(label) for label in rows(path)[0]["labels"]] == [float, float, type(None)]
    soft = [StepExample("c", "q", (), (Step("s", 0.9),))]
    write_stepwise(path, soft, soft=True)
    assert rows(path)[0]["labels"] == [0.9]
    with pytest.raises(
        DataError, match=r"labels 0 and 1 only, found the probability 0.9"
    ) as caught:
        write_stepwise(path, soft)
    assert caught.value.example == "c"
    assert rows(path)[0]["labels"] == [0.9]  # as it was


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"a": 1.0}, "one of the 1 ids that have a weight, found 'b'"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "1 weights without one, for example of id 'c'"),
    ],
)
def test_weights_and_examples_have_to_be_of_the_same_file(tmp_path, examples, weights, words):
    path = tmp_path / "out.jsonl"
    with pytest.raises(DataError, match=words):
        write_stepwise(path, examples, weights=weights)
    assert not path.exists()


def test_read_weights(tmp_path):
    path = tmp_path / "weights.jsonl"
    path.write_text('{"id": "a", "weight": 1, "visits": 3}\n{"id": "b", "weight": 0.5}\n')
    assert read_weights(path) == {"a": 1.0, "b": 0.5}


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("3", "id"),
        ('{"weight": 1}', "id"),
        ('{"id": 3, "weight": 1}', "id"),
        ('{"id": "b"}', "weight"),
        ('{"id": "b", "weight": "1"}', "weight"),
        ('{"id": "b", "weight": true}', "weight"),
        ('{"id": "a", "weight": 1}', "id"),
        ('{"id": "b", "weight": NaN}', None),
    ],
)
def test_weights_that_are_none_are_refused(tmp_path, line, field):
    path = tmp_path / "weights.jsonl"
    path.write_text('{"id": "a", "weight": 1}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        read_weights(path)
    assert (caught.value.line, caught.value.field) == (2, field)
