"""What a training run refuses to read, each in the words of what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from prm.data.bad_rows import BadRows
from prm.schema import DataError, Step, StepExample
from recipes.models.loading import Solutions
from recipes.train.data import _require_pairs, require


def data(examples: list[StepExample], *bad_rows: object) -> Solutions:
    path = Path("train.jsonl")
    bad = BadRows(path, *bad_rows)
    bad.rows = len(examples)
    return Solutions(path, examples, range(1, len(examples) + 1), bad)


def example(**more):
    fields = {"id": "a", "question": "q", "images": (), "steps": (Step("s", 0.5),)}
    return StepExample(**fields | more)


FULL = example(domain="d", group="g", correct=False)


@pytest.mark.parametrize(
    ("what", "lacking", "message"),
    [
        (
            "labels",
            example(steps=(Step("s"), Step("t"))),
            "field steps[].label: expected at least one labelled step, found none; "
            "label a step or remove the example",
        ),
        (
            "correct",
            example(),
            "field correct: expected true or false, found nothing; "
            "meta examples must say whether the solution's answer is right",
        ),
        (
            "group",
            example(),
            "field group: expected the name of the question, found nothing; "
            'loss_target "pairs" compares solutions of one question; name it, or use "both"',
        ),
        (
            "domain",
            example(),
            "field domain: expected a name, found nothing; "
            "--weighting domain and the feature domain need one: name the example's, or use "
            "another weighting or other features",
        ),
    ],
)
def test_the_first_example_that_lacks_something_is_named(what, lacking, message):
    require(data([FULL, FULL]), what)
    with pytest.raises(DataError) as error:
        require(data([FULL, lacking, FULL, lacking]), what)
    assert str(error.value) == f"train.jsonl:2: {message}"


def test_one_label_suffices_whichever_it_is():
    require(data([example(steps=(Step("s"), Step("t", 0.0)))]), "labels")


def test_examples_that_lack_something_are_left_out_on_request():
    unlabelled = example(id="b", steps=(Step("s"),))
    given = data([FULL, unlabelled, FULL, FULL], "skip", 0.3)
    left = require(given, "labels")
    assert (left.examples, left.lines) == ([FULL, FULL, FULL], [1, 3, 4])
    (row,) = given.bad.left_out
    assert (row.line, row.field, row.id) == (2, "steps[].label", "b")
    with pytest.raises(DataError, match=r"found 2 of 4 rows \(50.0 %\); the first is line 1"):
        require(data([unlabelled, FULL, unlabelled, FULL], "skip", 0.3), "labels")


def test_questions_in_several_groups_are_counted_where_pairs_are_missing(capsys):
    rows = [example(question=f"q{n // 2}", group=f"{n}", correct=n % 2 == 0) for n in range(6)]
    with pytest.raises(DataError) as error:
        _require_pairs(data(rows))
    assert str(error.value) == (
        "train.jsonl: expected questions with both a right and a wrong solution, which "
        "--loss-target pairs compares, found none among 6 groups, which have 3 different questions "
        "with 6 solutions; give all solutions of a question one group, since pairs are of one "
        "group, or use --loss-target both"
    )
    mixed = [example(question="q0", group="0", correct=False), *rows]
    _require_pairs(data(mixed))
    assert "1 of 6 groups, which have 3 different questions, have" in capsys.readouterr().out


def test_pairs_of_one_question_have_its_pictures_too(tmp_path):
    for name, content in (("a", b"1"), ("same", b"1"), ("other", b"2")):
        (tmp_path / name).write_bytes(content)
    rows = [
        example(group="g", correct=correct, images=(tmp_path / name,))
        for name, correct in (("a", True), ("same", False), ("other", False))
    ]
    _require_pairs(data(rows[:2]))
    with pytest.raises(DataError, match="the group 'g' with another question than on line 1"):
        _require_pairs(data(rows))


def test_pairs_are_not_taken_of_a_group_with_two_questions():
    groups = [("g", "One?", True), ("h", "One?", False), ("g", "one? ", False), ("g", "Two?", True)]
    rows = [
        example(question=question, group=group, correct=correct)
        for group, question, correct in groups
    ]
    _require_pairs(data(rows[:3]))
    with pytest.raises(DataError) as error:
        _require_pairs(data(rows))
    assert str(error.value) == (
        "train.jsonl:4: field group: expected solutions of one question in a group, which "
        "--loss-target pairs compares, found the group 'g' with another question than on line 1; "
        "give every question a group of its own, or use --loss-target both"
    )
