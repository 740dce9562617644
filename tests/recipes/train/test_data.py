"""What a training run refuses to read, each in the words of what it is for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from prm.schema import DataError, Step, StepExample
from recipes.train.data import require


@dataclass(frozen=True)
class Data:
    examples: list[StepExample]
    path: Path = Path("train.jsonl")


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
    require(Data([FULL, FULL]), what)
    with pytest.raises(DataError) as error:
        require(Data([FULL, lacking, FULL, lacking]), what)
    assert str(error.value) == f"train.jsonl:2: {message}"


def test_one_label_suffices_whichever_it_is():
    require(Data([example(steps=(Step("s"), Step("t", 0.0)))]), "labels")
