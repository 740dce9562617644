"""Rules for layers: linear maps, look-ups, normalisations, convolutions. See ``operations``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bilevel.lower.ghost.elementwise_uses import Normalised
from bilevel.lower.ghost.tracker import Tracker
from bilevel.lower.ghost.uses import Convolution, Embedding, Linear, Vector


def linear(t: Tracker, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Apply ``input @ weight.T + bias``."""
    if not t.from_batch(input, weight, bias):
        if not t.find(input):
            return t.affine(partial(functional.linear, input), weight, bias)
        if not t.find(weight):
            return t.affine(lambda x, shift: functional.linear(x, weight, shift), input, bias)
    if t.find(input) or not t.from_batch(input) or input.dim() < 2 or weight.dim() != 2:
        return NotImplemented
    w, b = t.find(weight), t.find(bias)
    output = functional.linear(input, t.value(weight), t.value(bias))
    saved = (input,) if w else ()
    return t.tap(output, Linear(w is not None, b is not None), (w, b), input, saved)


def matmul(t: Tracker, input: Tensor, other: Tensor) -> Any:
    """Apply ``input @ other``, where ``other`` is the parameter, a matrix or a vector."""
    w = t.find(other)
    if w is not None and t.find(input):
        return NotImplemented
    if not t.from_batch(input, other):
        if w is None:
            return t.affine(lambda image: torch.matmul(image, other), input)
        return t.affine(lambda image: torch.matmul(input, image), other)
    if w is None or input.dim() < 2 or other.dim() > 2:
        return NotImplemented
    output = torch.matmul(input, w.value)
    by_columns = other.dim() == 2 and other.stride() == (1, len(other)) and other.shape[1] > 1
    use = Vector() if other.dim() == 1 else Linear(True, False, True, by_columns)
    return t.tap(output, use, (w,), input, (input,))


def addmm(
    t: Tracker, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Any:
    """Apply ``input + mat1 @ mat2``, with a bias vector as input."""
    if t.find(mat1) or beta != 1 or alpha != 1 or t.from_batch(input, mat2):
        return NotImplemented
    if not t.from_batch(mat1):
        return t.affine(lambda shift, image: torch.addmm(shift, mat1, image), input, mat2)
    if input.dim() != 1:
        return NotImplemented
    b, w = t.find(input), t.find(mat2)
    output = torch.addmm(t.value(input), mat1, t.value(mat2))
    by_columns = mat2.stride() == (1, len(mat2)) and mat2.shape[1] > 1
    use = Linear(w is not None, b is not None, True, by_columns)
    return t.tap(output, use, (w, b), mat1, (mat1,) if w else ())


def embedding(
    t: Tracker,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Apply ``weight[input]``."""
    w = t.find(weight)
    if w is None or max_norm is not None or scale_grad_by_freq:
        return NotImplemented
    lookup = partial(functional.embedding, input, padding_idx=padding_idx)
    if not t.from_batch(input) or input.dim() == 0:
        # The padding row of μ is left out, too, since no gradient flows through it.
        def tangent(direction: Tensor) -> Tensor:
            along = functional.embedding(input, direction)
            if padding_idx is None:
                return along
            at_padding = input == padding_idx % len(direction)
            return along.masked_fill(at_padding[..., None], 0.0)

        return t.derive(lookup, w, tangent=tangent)
    padding = -1 if padding_idx is None else padding_idx % len(weight)
    use = Embedding(len(weight), padding, False)
    return t.tap(lookup(w.value), use, (w,), input, (input,))


def index(t: Tracker, tensor: Tensor, key: Any) -> Any:
    """Apply ``tensor[key]``, a look-up of rows or a view."""
    w = t.find(tensor)
    if w is None or t.find(key):
        return NotImplemented
    looks_up = isinstance(key, Tensor) and key.dtype == torch.int64 and tensor.dim() == 2
    if looks_up and t.from_batch(key) and not (key.numel() and int(key.min()) < 0):
        return embedding(t, key, tensor)  # which has no negative indices
    return t.derive(lambda parameter: parameter[key], w, tangent=lambda along: along[key])


def layer_norm(
    t: Tracker,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    """Apply ``weight · x̂ + bias`` over the last dimensions."""
    shape = torch.Size(normalized_shape)
    if not t.find(input) and not t.from_batch(input):
        return t.affine(
            lambda scale, shift: functional.layer_norm(input, shape, scale, shift, eps),
            weight,
            bias,
        )
    if t.find(input) or input.dim() <= len(shape):
        return NotImplemented
    w, b = t.find(weight), t.find(bias)
    output = functional.layer_norm(input, shape, t.value(weight), t.value(bias), eps)

    def kernel(gradient: Tensor, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x = x.to(gradient.dtype)
        _, mean, deviation = torch.native_layer_norm(x, shape, None, None, eps)
        ones = x.new_ones(shape)  # Required, but not read for the parameters' gradients.
        wanted = [False, w is not None, b is not None]
        _, weight_gradient, bias_gradient = torch.ops.aten.native_layer_norm_backward(
            gradient, x, shape, mean, deviation, ones, ones, wanted
        )
        return weight_gradient, bias_gradient

    normalise = partial(_layer_normalised, shape=shape, eps=eps)
    use = Normalised(w is not None, b is not None, shape, normalise, kernel)
    return t.tap(output, use, (w, b), input, (input,))


def rms_norm(
    t: Tracker,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    """Apply ``weight · x / rms(x)`` over the last dimensions."""
    w, shape = t.find(weight), torch.Size(normalized_shape)
    if w is None or t.find(input):
        return NotImplemented
    if not t.from_batch(input):
        return t.affine(lambda scale: functional.rms_norm(input, shape, scale, eps), weight)
    if input.dim() <= len(shape):
        return NotImplemented
    output = functional.rms_norm(input, shape, w.value, eps)

    def normalise(x: Tensor) -> Tensor:
        return functional.rms_norm(x, shape, None, eps)

    return t.tap(output, Normalised(True, False, shape, normalise), (w,), input, (input,))


def group_norm(
    t: Tracker,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    """Apply ``weight · x̂ + bias``, with a weight and a bias per channel (dimension 1)."""
    if not t.find(input) and not t.from_batch(input):
        return t.affine(
            lambda scale, shift: functional.group_norm(input, num_groups, scale, shift, eps),
            weight,
            bias,
        )
    if t.find(input) or input.dim() < 2:
        return NotImplemented
    w, b = t.find(weight), t.find(bias)
    output = functional.group_norm(input, num_groups, t.value(weight), t.value(bias), eps)
    rows, channels, positions = len(input), input.shape[1], input[0, 0].numel()

    def kernel(gradient: Tensor, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x = x.to(gradient.dtype).contiguous()
        sizes = (rows, channels, positions, num_groups)
        _, mean, deviation = torch.native_group_norm(x, None, None, *sizes, eps)
        wanted = [False, w is not None, b is not None]
        ones = x.new_ones(channels)
        _, weight_gradient, bias_gradient = torch.ops.aten.native_group_norm_backward(
            gradient.contiguous(), x, mean, deviation, ones, *sizes, wanted
        )
        return weight_gradient, bias_gradient

    use = Normalised(
        w is not None,
        b is not None,
        torch.Size([channels]),
        lambda x: functional.group_norm(x, num_groups, None, None, eps),
        kernel,
        channels=True,
    )
    return t.tap(output, use, (w, b), input, (input,))


def convolution(
    t: Tracker,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    convolve: Callable[..., Tensor],
) -> Any:
    """Apply a convolution to inputs [rows, channels, ...]."""
    options = (stride, padding, dilation, groups)
    if not t.from_batch(input, weight, bias) and not t.find(input):
        return t.affine(lambda *at: convolve(input, *at, *options), weight, bias)
    size = weight.dim() - 2
    strides, dilations = _per_axis(stride, size), _per_axis(dilation, size)
    paddings = _paddings(padding, weight.shape[2:], dilations)
    if t.find(input) or input.dim() != weight.dim() or paddings is None:
        return NotImplemented
    if t.from_batch(weight, bias):
        return NotImplemented
    w, b = t.find(weight), t.find(bias)
    output = convolve(input, t.value(weight), t.value(bias), *options)
    use = Convolution(w is not None, b is not None, strides, paddings, dilations, groups)
    return t.tap(output, use, (w, b), input, (input, t.value(weight)))


def _per_axis(value: int | Sequence[int], size: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * size if len(values) == 1 else values


def _paddings(
    padding: int | str | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...] | None:
    """Return the padding per axis; None if it is not the same on both sides."""
    if padding == "valid":
        return (0,) * len(kernel)
    if padding == "same":
        total = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        return None if any(pad % 2 for pad in total) else tuple(pad // 2 for pad in total)
    if isinstance(padding, str):
        return None
    return _per_axis(padding, len(kernel))


def _layer_normalised(x: Tensor, shape: torch.Size, eps: float) -> Tensor:
    return functional.layer_norm(x, shape, None, None, eps)
