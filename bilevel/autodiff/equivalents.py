"""Operations written out in terms of others, whose derivatives torch (as of 2.13) has right.

Each takes the arguments of the operation that it stands for, and has its values up to rounding.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
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


def weight_norm(
    v: Float[Tensor, "..."], g: Float[Tensor, "..."], dim: int = 0
) -> Float[Tensor, "..."]:
    """Return ``g v / ‖v‖``, the norm being over all dimensions but one (-1: over all).

    torch's derivative of the gradient leaves out that the norm depends on v, without an error.
    """
    others = [one for one in range(v.dim()) if dim == -1 or one != dim % v.dim()]
    norm: Tensor = torch.linalg.vector_norm(v, dim=others, keepdim=dim != -1)
    return v * (g / norm)


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


def dropout(
    input: Float[Tensor, "..."], p: float = 0.5, training: bool = True, inplace: bool = False
) -> Float[Tensor, "..."]:
    """Drop entries at random, the same as outside of transforms.

    Within transforms torch draws the noise in the order of a contiguous tensor, outside in that of
    the input's memory: of a transposed one it would drop others. (On a CPU; elsewhere the random
    numbers of the operation are its own, and it is called as it is.)
    """
    if not input.is_cpu or not training or p in (0, 1):
        return functional.dropout(input, p, training, inplace)
    noise = _noise(input, p).div_(1 - p)
    return input.mul_(noise) if inplace else input * noise


def alpha_dropout(
    input: Float[Tensor, "..."], p: float = 0.5, training: bool = False, inplace: bool = False
) -> Float[Tensor, "..."]:
    """Replace entries at random by SELU's lower limit, as ``dropout`` draws them.

    What it returns is a x + b with the mean and variance of x (Klambauer et al. 2017, arXiv
    1706.02515).
    """
    if not input.is_cpu or not training or p in (0, 1):
        return functional.alpha_dropout(input, p, training, inplace)
    limit = 1.7580993408473766
    scale = ((limit**2 * p + 1) * (1 - p)) ** -0.5
    noise = _noise(input, p)
    shift = (noise - 1) * (limit * scale) + limit * scale * p
    noise.mul_(scale)
    return input.mul_(noise).add_(shift) if inplace else input * noise + shift


def embedding(
    input: Int[Tensor, "*batch"],
    weight: Float[Tensor, "rows size"],
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Float[Tensor, "*batch size"]:
    """Look rows up; the padding row, which has no gradient, gets no tangent either.

    Raises:
        NotImplementedError: ``scale_grad_by_freq``, whose gradient is no derivative.
    """
    if scale_grad_by_freq:
        raise NotImplementedError(
            "the gradient of an embedding with scale_grad_by_freq is no derivative, and none of it "
            "in turn is right in torch: leave the option out"
        )
    rows = functional.embedding(input, weight, None, max_norm, norm_type)
    if padding_idx is None:
        return rows
    padded = (input == padding_idx % len(weight))[..., None]
    return torch.where(padded, weight[padding_idx].detach(), rows)


def gumbel_softmax(
    logits: Float[Tensor, "..."],
    tau: float = 1,
    hard: bool = False,
    eps: float = 1e-10,
    dim: int = -1,
) -> Float[Tensor, "..."]:
    """Draw from the relaxed categorical distribution; hard draws have the gradient of soft ones.

    By operations that a mode sees, the detach of the soft ones among them.
    """
    soft = functional.gumbel_softmax(logits, tau, dim=dim)
    if not hard:
        return soft
    index = soft.max(dim, keepdim=True)[1]
    one_hot = torch.zeros_like(logits).scatter_(dim, index, 1.0)
    return one_hot - soft.detach() + soft


def _noise(like: Tensor, p: float) -> Tensor:
    """Return 1 with probability 1 − p, drawn into a tensor of the same order in memory."""
    layout = torch.empty_strided(like.shape, like.stride(), device="meta")
    strides = torch.empty_like(layout).stride()  # those of an expanded tensor are others
    noise = torch.empty_strided(like.shape, strides, dtype=like.dtype, device=like.device)
    return noise.bernoulli_(1 - p)


def _reduced(
    errors: Tensor, size_average: bool | None, reduce: bool | None, reduction: str
) -> Tensor:
    """Reduce as torch's losses do, whose first two options are those before ``reduction``."""
    if size_average is not None or reduce is not None:
        reduction = "none" if reduce is False else "sum" if size_average is False else "mean"
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    return errors if reduction == "none" else errors.sum() if reduction == "sum" else errors.mean()
