"""Operations written out in terms of others, whose derivatives torch (as of 2.13) has right.

Each takes the arguments of the operation that it stands for, and has its values up to rounding.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional


def masked_scatter(
    input: Float[Tensor, "..."], mask: Bool[Tensor, "..."], source: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """Replace the k-th true entry of the mask, in memory order, by the k-th one of ``source``.

    It inserts image features into the text in multimodal models of transformers. In forward over
    reverse mode, torch gives the gradient of the scattered values the tangent of the whole tensor.
    This raises an error if the sizes differ, and is wrong if not.
    """
    input, mask = torch.broadcast_tensors(input, mask)
    if not source.numel():
        return input.clone()
    rank = (mask.reshape(-1).cumsum(0) - 1).clamp(0, source.numel() - 1)
    return torch.where(mask, source.reshape(-1)[rank].view(mask.shape), input)


def mse_loss(
    input: Float[Tensor, "..."],
    target: Float[Tensor, "..."],
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "..."]:
    """Compute the squared error; its mean in two steps.

    The derivative of torch's mean divides a tangent in place, which raises an error where one of
    the two arguments does not move (pytorch#123996).
    """
    if weight is not None:  # torch writes this out itself; its stub has no weight yet
        weighted: Any = functional.mse_loss
        return cast("Tensor", weighted(input, target, size_average, reduce, reduction, weight))
    errors = functional.mse_loss(input, target, reduction="none")
    return _reduced(errors, size_average, reduce, reduction)


def huber_loss(
    input: Float[Tensor, "..."],
    target: Float[Tensor, "..."],
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "..."]:
    """Compute δ times the smooth L1 loss of width δ; the gradient of torch's has no tangent."""
    errors = delta * functional.smooth_l1_loss(input, target, reduction="none", beta=delta)
    return _reduced(errors if weight is None else errors * weight, None, None, reduction)


def soft_margin_loss(
    input: Float[Tensor, "..."],
    target: Float[Tensor, "..."],
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    """Compute ``log(1 + exp(−y x))``; the gradient of torch's has no tangent."""
    errors = -functional.logsigmoid(target * input)
    return _reduced(errors, size_average, reduce, reduction)


def _reduced(
    errors: Tensor, size_average: bool | None, reduce: bool | None, reduction: str
) -> Tensor:
    """Reduce as torch's losses do, whose first two options are those before ``reduction``."""
    if size_average is not None or reduce is not None:
        reduction = "none" if reduce is False else "sum" if size_average is False else "mean"
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    return errors if reduction == "none" else errors.sum() if reduction == "sum" else errors.mean()
