"""A baseline that predicts the label of a step from its place alone, without the text.

A judge that only learned at which steps solutions tend to go wrong has a high AUC over all steps.
Here is that judge, and an AUC that compares steps of the same place only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from prm.evaluation.metrics import roc_auc
from prm.schema import StepExample

Place = tuple[int, bool]


def places(example: StepExample) -> list[Place]:
    """Of every step: its number from 0, and whether it is the last."""
    last = len(example.steps) - 1
    return [(number, number == last) for number in range(last + 1)]


def position_scores(train: Sequence[StepExample], rows: Sequence[StepExample]) -> list[Tensor]:
    """Step scores [steps] of every row: (1 + right) / (2 + all) training steps of the same place.

    A place that the training set does not have scores 1/2.
    """
    counted: Counter[Place] = Counter()
    right: Counter[Place] = Counter()
    for example in train:
        for place, step in zip(places(example), example.steps, strict=True):
            if step.label is not None:
                counted[place] += 1
                right[place] += step.label > 0.5
    return [
        torch.tensor([(1 + right[place]) / (2 + counted[place]) for place in places(row)])
        for row in rows
    ]


def auc_by_place(rows: Sequence[StepExample], scores: Sequence[Tensor]) -> float | None:
    """Chance that a right step scores above a wrong one of the same place, ties counting one half.

    Pairs over all places count alike: Σ_p n⁺_p n⁻_p AUC_p / Σ_p n⁺_p n⁻_p. None without a pair.
    """
    truth: dict[Place, list[bool]] = {}
    predicted: dict[Place, list[float]] = {}
    for row, values in zip(rows, scores, strict=True):
        for place, step, value in zip(places(row), row.steps, values.tolist(), strict=True):
            if step.label is not None:
                truth.setdefault(place, []).append(step.label > 0.5)
                predicted.setdefault(place, []).append(value)
    above = pairs = 0.0
    for place, right in truth.items():
        count = sum(right) * (len(right) - sum(right))
        if count:
            above += count * roc_auc(np.array(right, dtype=float), predicted[place])
            pairs += count
    return above / pairs if pairs else None
