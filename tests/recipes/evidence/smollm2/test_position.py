"""The judge that looks at the position of a step only, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prm.evaluation.metrics import roc_auc
from prm.schema import Step, StepExample
from recipes.evidence.smollm2.position import auc_by_position, position_scores, positions


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


def test_within_a_place_the_baseline_knows_nothing():
    rows = [solution(1, 1, 0), solution(1, 0, 0), solution(0, 0, 1)]
    scores = position_scores(rows, rows)
    assert auc_by_position(rows, scores) == 0.5


def test_one_place_is_the_plain_auc():
    labels, said = [1.0, 0.0, 1.0, 0.0, 0.0], [0.2, 0.1, 0.9, 0.9, 0.4]
    rows = [solution(label) for label in labels]
    plain = roc_auc(np.array(labels), said)
    assert auc_by_position(rows, [torch.tensor([x], dtype=torch.float64) for x in said]) == plain


def test_pairs_of_all_positions_count_alike():
    rows = [solution(1, 1), solution(0, 1), solution(0, 0)]
    scores = [torch.tensor(x) for x in ([0.9, 0.1], [0.2, 0.8], [0.95, 0.5])]
    # First place: 1 of 2 pairs in order; last: (0.1 < 0.5) and (0.8 > 0.5), again 1 of 2.
    assert auc_by_position(rows, scores) == pytest.approx(2 / 4)
    assert auc_by_position([solution(1, 1)], [torch.tensor([0.5, 0.5])]) is None
