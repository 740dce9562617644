"""A baseline that predicts the label of a step from its position alone, without the text.

A judge that only learned at which positions solutions tend to fail has a high AUC over all steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

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
