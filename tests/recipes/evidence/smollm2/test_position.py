"""The judge that looks at the position of a step only, by hand."""

from __future__ import annotations

import pytest

from prm.schema import Step, StepExample
from recipes.evidence.smollm2.position import position_scores, positions


def solution(*labels: float | None) -> StepExample:
    return StepExample("x", "q", (), tuple(Step("s", label) for label in labels))


def test_positions():
    assert positions(solution(1, 1, 0)) == [(0, False), (1, False), (2, True)]
    assert positions(solution(1)) == [(0, True)]


def test_scores_are_shares_of_right_steps_per_position():
    train = [solution(1, 1, 0), solution(1, 0), solution(0, None, 1.0), solution(0.75, 0, 0)]
    (row,) = position_scores(train, [solution(1, 1, 1, 1)])
    # First steps: 3 of 4 right; seconds that are not last: 1 of 2; of the others none was seen.
    assert row.tolist() == pytest.approx([4 / 6, 2 / 4, 1 / 2, 1 / 2])
    (row,) = position_scores(train, [solution(1, 1)])
    assert row.tolist() == pytest.approx([4 / 6, 1 / 3])
