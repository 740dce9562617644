"""Normalisation of weights to mean 1, so that they choose among instances and nothing else.

The overall level of the weights acts as a second learning rate on the lower level: without
normalisation the upper level mostly tunes that, and all weights run to one bound together.

NaN weights stay NaN: they come from a model that diverged, and its loss says so. On a device, where
to look at the mean would be to wait for it, weights of too small a mean are NaN instead of an
error.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_SMALLEST_MEAN = 1e-3


def batch_mean_one(weights: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """``weights / mean(weights)`` over the batch; the mean is part of the derivative.

    The hypergradient of a weight is then its own signal minus the batch's (weighted) mean signal:
    a common part that every instance of the batch shares cancels. Weights that are all 0 stay so:
    no example has a part in such a batch, as happens to small ones when many are left out.

    Raises:
        ValueError: A batch of one (its weight would always be 1) or, on the CPU, a mean near or
            below 0 of weights of which some are not 0.
    """
    if weights.numel() < 2:
        raise ValueError(
            "normalising over the batch needs at least two examples per micro-batch (a single "
            "example would always get weight 1); use a larger batch or normalise over the table"
        )
    mean = weights.mean()
    nothing = (weights == 0.0).all()
    if not mean.is_cpu:
        return _divided(weights, torch.where(nothing, 1.0, mean), "batch mean")
    return weights if nothing else _divided(weights, mean, "batch mean")


def mean_one(weights: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """``weights / mean(weights)`` of a whole table, the mean being part of the derivative.

    Raises:
        ValueError: A mean near or below 0, on the CPU.
    """
    return _divided(weights, weights.mean(), "mean")


def mean_one_over(
    weights: Float[Tensor, " batch"], all_weights: Float[Tensor, " rows"]
) -> Float[Tensor, " batch"]:
    """``weights / mean(all_weights)``, the mean held constant in the derivative.

    For tables: ``all_weights`` are the weights of every row, so that any batch size works and only
    the rows that were visited get a gradient.

    Raises:
        ValueError: A mean near or below 0, on the CPU.
    """
    return _divided(weights, all_weights.detach().mean(), "mean over the table")


def _divided(weights: Tensor, mean: Tensor, what: str) -> Tensor:
    if not mean.is_cpu:
        return weights / torch.where(mean > _SMALLEST_MEAN, mean, torch.nan)
    value = float(mean.detach())
    if value <= _SMALLEST_MEAN:
        raise ValueError(
            f"cannot normalise weights whose {what} is {value:.3g}; expected more than "
            f"{_SMALLEST_MEAN:g}. Choose a bound without negative weights, or no normalisation"
        )
    return weights / mean
