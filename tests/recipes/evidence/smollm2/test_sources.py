"""Labels of the three annotators, by hand, and how many each gives."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from prm.schema import Step, StepExample
from recipes.evidence.smollm2.sources import SOURCES, Mixture, beginnings, judged

PUZZLE = "4 5 6 10"


def solution(*steps: tuple[str, int], correct: bool = False) -> StepExample:
    given = tuple(Step(text, float(label)) for text, label in steps)
    return StepExample("x", PUZZLE, (), given, correct=correct, group=PUZZLE)


FIRST = ("10 - 4 = 6 (left: 5 6 6)", 1)
RIGHT = solution(
    FIRST,
    ("5 * 6 = 30 (left: 6 30)", 1),
    ("30 - 6 = 24 (left: 24)", 1),
    ("Answer: 5 * (10 - 4) - 6 = 24", 1),
    correct=True,
)
CHEAT = solution(
    FIRST,
    ("6 / 6 = 1 (left: 1 5)", 0),  # 24 cannot be made of 1 and 5
    ("1 * 5 = 24 (left: 24)", 0),
    ("Answer: (10 - 4) / 6 * 5 = 24", 0),
)
HONEST = solution(
    FIRST,
    ("6 + 6 = 12 (left: 5 12)", 0),
    ("12 + 5 = 17 (left: 17)", 0),
    ("Answer: 10 - 4 + 6 + 5 = 17", 0),
)
OTHER = solution(("5 * 4 = 20 (left: 6 10 20)", 1), ("Answer: None", 0))


def labels(example: StepExample, source: str, *solutions: StepExample) -> list[float | None]:
    found = judged(example, source, beginnings(solutions))
    truth = [step.label for step in example.steps]
    given = [step.label for step in found.steps]
    assert found.extra["source"] == source
    assert found.extra["wrong_labels"] == sum(a != b for a, b in zip(given, truth, strict=True))
    assert [step.text for step in found.steps] == [step.text for step in example.steps]
    return given


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        (RIGHT, [1, 1, 1, 1]),
        (CHEAT, [1, 0, 1, 1]),  # what it states at its end is believed
        (HONEST, [1, 0, 0, 0]),
        (OTHER, [1, 0]),  # 20 + 10 - 6
    ],
)
def test_the_credulous_annotator_believes_what_is_stated(example, expected):
    assert labels(example, "credulous") == expected


@pytest.mark.parametrize("text", ["7 moves", "1 + 1 = 2 (left: x)", "1 + 1 = 2 (left: )"])
def test_a_move_that_lists_no_numbers_is_wrong(text):
    assert labels(solution((text, 0)), "credulous") == [0]


@pytest.mark.parametrize(
    ("answer", "believed"),
    [
        ("Answer: 6 * 4 = 24", 1),
        ("Answer: 6 * 4 =24.", 1),
        ("Answer: 6 * 4 = 124", 0),
        ("Answer: 24 = 6 * 5", 0),
        ("Answer: 6 * 4 = 240", 0),
        ("Answer: None", 0),
    ],
)
def test_answers_that_say_24(answer, believed):
    assert labels(solution((answer, 0)), "credulous") == [believed]


def test_rollouts_are_the_candidates_that_begin_alike():
    everyone = (RIGHT, CHEAT, HONEST, OTHER)
    assert labels(CHEAT, "rollout", *everyone) == [1, 0, 0, 0]
    assert labels(RIGHT, "rollout", *everyone) == [1, 1, 1, 1]
    assert labels(OTHER, "rollout", *everyone) == [0, 0]  # none of those that began so came out
    assert labels(CHEAT, "rollout", CHEAT, HONEST) == [0, 0, 0, 0]
    assert labels(CHEAT, "verified") == [1, 0, 0, 0]


def test_shares_of_the_sources():
    drawn = Mixture().of(160, Random(0))
    assert Counter(drawn) == {"verified": 48, "credulous": 88, "rollout": 24}
    assert drawn != sorted(drawn)
    assert Counter(Mixture(0.5, 0.25, 0.25).of(5, Random(1))) == {
        "verified": 2, "credulous": 2, "rollout": 1
    }  # fmt: skip
    with pytest.raises(ValueError, match="expected shares of verified, credulous, rollout that"):
        Mixture(verified=0.5).of(4, Random(0))
    assert len(SOURCES) == 3
