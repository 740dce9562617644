"""A baseline that predicts the label of a step from its position alone, without the text.

A judge that only learned at which positions solutions tend to fail has a high AUC over all steps.
This module has that judge, and an AUC that compares only steps of the same position.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from prm.evaluation.metrics import roc_auc
from prm.schema import StepExample

Position = tuple[int, bool]


def positions(example: StepExample) -> list[Position]:
    """Return the position of every step: its index from 0, and whether it is the last."""
    last = len(example.steps) - 1
    return [(number, number == last) for number in range(last + 1)]


def position_scores(train: Sequence[StepExample], rows: Sequence[StepExample]) -> list[Tensor]:
    """Return step scores [steps] of every row by position.

    The score is (1 + right) / (2 + all) over the training steps of that position, which is 1/2 for
    a position that the training set lacks.
    """
    counted: Counter[Position] = Counter()
    right: Counter[Position] = Counter()
    for example in train:
        for position, step in zip(positions(example), example.steps, strict=True):
            if step.label is not None:
                counted[position] += 1
                right[position] += step.label > 0.5
    return [
        torch.tensor(
            [(1 + right[position]) / (2 + counted[position]) for position in positions(row)]
        )
        for row in rows
    ]


def auc_by_position(rows: Sequence[StepExample], scores: Sequence[Tensor]) -> float | None:
    """Return the chance that a right step scores above a wrong one of the same position.

    Ties count one half, and every pair has the same weight: Σ_p n⁺_p n⁻_p AUC_p / Σ_p n⁺_p n⁻_p. It
    is None if there is no pair.
    """
    truth: dict[Position, list[bool]] = {}
    predicted: dict[Position, list[float]] = {}
    for row, values in zip(rows, scores, strict=True):
        for position, step, value in zip(positions(row), row.steps, values.tolist(), strict=True):
            if step.label is not None:
                truth.setdefault(position, []).append(step.label > 0.5)
                predicted.setdefault(position, []).append(value)
    above = pairs = 0.0
    for position, right in truth.items():
        count = sum(right) * (len(right) - sum(right))
        if count:
            above += count * roc_auc(np.array(right, dtype=float), predicted[position])
            pairs += count
    return above / pairs if pairs else None
