"""The average of v in place: v̄ ← ρ v̄ + (1 − ρ) v, and back."""

from __future__ import annotations

from collections.abc import Iterator

import optree
import torch
from torch import Tensor

from bilevel.hypergradients.one_step import DirectionAverage
from bilevel.resident.parts import parts
from bilevel.tree import Tree


@torch.no_grad()
def average_(v: Tree, average: DirectionAverage, decay: float) -> DirectionAverage:
    """Put v into the average, and the bias-corrected average into v, both in place.

    Args:
        v: An upper gradient; None leaves are zero, and stay None.
        average: The average and the number of gradients in it; the tensors of the former change.
        decay: ρ.

    Returns:
        The same tensors with one gradient more.
    """
    updates = average.updates + 1
    correction = 1.0 - decay ** int(updates)
    for mean, new in _pairs(average, v):
        mean.mul_(decay)
        if new is not None:
            mean.add_(new.to(mean.dtype) * (1.0 - decay))
            new.copy_(mean / correction)
    return DirectionAverage(average.average, updates)


@torch.no_grad()
def without_(v: Tree, average: DirectionAverage, decay: float) -> None:
    """Take v out of the average again, in place and to rounding.

    Args:
        v: The upper gradient that was put in.
        average: The average.
        decay: ρ.
    """
    for mean, new in _pairs(average, v):
        if new is not None:
            mean.sub_(new.to(mean.dtype) * (1.0 - decay))
        mean.div_(decay)


def _pairs(average: DirectionAverage, v: Tree) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the average and v, part by part."""
    means, structure = optree.tree_flatten(average.average, none_is_leaf=True)
    gradients = structure.flatten_up_to(v)
    for part in parts([means, gradients]):
        for cut in part:
            mean = cut.of(means)
            assert mean is not None
            yield mean, cut.of(gradients)
    for mean, gradient in zip(means, gradients, strict=True):
        if mean is not None and gradient is None:
            yield mean, None
