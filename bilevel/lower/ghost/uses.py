"""Uses of parameters by operations: gradients, per-row gradients and their products with μ.

Axes: rows (the leading dimension of b), tokens (all dimensions between rows and channels).
``gradients`` runs the very kernels of autograd's own backward formulas, so that an ordinary
training step is reproduced bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bilevel.lower.ghost.rows import (
    RowGradients,
    contracted,
    formed,
    products,
    row_dots,
    scale_rows,
)

# From this many tokens per row on, forming a row's gradient by a matrix product (which the weighted
# gradient then need not pay again) is cheaper than contracting with μ. Measured on a CPU, for
# weights of up to SMALL_WEIGHT entries and for larger ones; elsewhere by arithmetic, memory traffic
# being dearer there.
FORM_SMALL_FROM = 12
FORM_FROM = 40
FORM_OFF_CPU_FROM = 512
SMALL_WEIGHT = 1 << 16


@dataclass(frozen=True)
class Linear:
    """``y = x Wᵀ + bias`` or, transposed, ``y = x W + bias``; saved: x [rows, ..., in].

    Either parameter may be missing (frozen). Per row, W's gradient is Σ_tokens b aᵀ, its product
    with μ Σ_tokens b·(μ a).
    """

    weight: bool
    bias: bool
    transposed: bool = False

    def gradients(self, b: Tensor, saved: Sequence[Tensor]) -> list[Tensor]:
        """As autograd: one matrix product over all rows and tokens."""
        b_flat = b.reshape(-1, b.shape[-1])
        result = []
        if self.weight:
            result.append(self._weight_gradient(b_flat, saved[0]))
        if self.bias:
            result.append(b_flat.sum(0))
        return result

    def row_gradients(
        self, b: Tensor, saved: Sequence[Tensor], keep: int | None
    ) -> list[RowGradients]:
        """Formed by batched matrix products, or contracted, whichever is cheaper."""
        result = []
        rows, tokens = len(b), b[0, ..., 0].numel()
        b_rows = b.reshape(rows, tokens, b.shape[-1])
        if self.weight:
            x_rows = saved[0].to(b.dtype).reshape(rows, tokens, -1)
            left, right = (x_rows, b_rows) if self.transposed else (b_rows, x_rows)
            entries = left.shape[-1] * right.shape[-1]
            if not _cheaper_formed(entries, tokens, b) or (
                keep is not None and rows * entries > keep
            ):
                result.append(self._contracted(b_rows, x_rows))
            elif keep is None:
                result.append(products(left, right))
            else:
                result.append(formed(torch.bmm(left.transpose(1, 2), right)))
        if self.bias:
            result.append(formed(b_rows.sum(1)))
        return result

    def _weight_gradient(self, b_flat: Tensor, x: Tensor) -> Tensor:
        x_flat = x.to(b_flat.dtype).reshape(-1, x.shape[-1])
        return x_flat.t().mm(b_flat) if self.transposed else b_flat.t().mm(x_flat)

    def _contracted(self, b_rows: Tensor, x_rows: Tensor) -> RowGradients:
        def weighted(weights: Tensor) -> Tensor:
            b_flat = (b_rows * weights[:, None, None]).flatten(0, 1)
            return self._weight_gradient(b_flat, x_rows)

        def dots(direction: Tensor) -> Tensor:
            direction = direction.to(x_rows.dtype)
            along = x_rows.matmul(direction if self.transposed else direction.t())
            return row_dots(b_rows, along)

        return contracted(weighted, dots)


@dataclass(frozen=True)
class Vector:
    """``y = x w`` with a vector w; saved: x [rows, ..., in]."""

    def gradients(self, b: Tensor, saved: Sequence[Tensor]) -> list[Tensor]:
        """As autograd: one matrix-vector product over all rows and tokens."""
        x = saved[0].to(b.dtype)
        return [x.reshape(-1, x.shape[-1]).t().mv(b.reshape(-1))]

    def row_gradients(
        self, b: Tensor, saved: Sequence[Tensor], keep: int | None
    ) -> list[RowGradients]:
        """Formed: small."""
        x_rows = saved[0].to(b.dtype).reshape(len(b), -1, saved[0].shape[-1])
        return [formed(b.reshape(len(b), 1, -1).bmm(x_rows).squeeze(1))]


@dataclass(frozen=True)
class Embedding:
    """``y = W[index]``; saved: index [rows, ...]."""

    count: int
    padding_index: int
    scale_by_frequency: bool

    def gradients(self, b: Tensor, saved: Sequence[Tensor]) -> list[Tensor]:
        """As autograd: rows of b added up by index."""
        return [
            torch.ops.aten.embedding_dense_backward(
                b, saved[0], self.count, self.padding_index, self.scale_by_frequency
            )
        ]

    def row_gradients(
        self, b: Tensor, saved: Sequence[Tensor], keep: int | None
    ) -> list[RowGradients]:
        """Contracted with the rows of μ that were looked up."""
        (index,) = saved

        def dots(direction: Tensor) -> Tensor:
            along = direction.to(b.dtype)[index]
            if self.padding_index >= 0:
                along = along.masked_fill((index == self.padding_index)[..., None], 0.0)
            return row_dots(b, along)

        return [contracted(lambda w: self.gradients(scale_rows(b, w), saved)[0], dots)]


@dataclass(frozen=True)
class Convolution:
    """1-, 2- or 3-dimensional convolution; saved: x [rows, in, ...], weight.

    Contracted: the product is Σ b·conv(x, μ), one more convolution.
    """

    weight: bool
    bias: bool
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def gradients(self, b: Tensor, saved: Sequence[Tensor]) -> list[Tensor]:
        """As autograd, by its kernel."""
        x, weight = saved
        size = len(self.stride)
        _, weight_gradient, bias_gradient = torch.ops.aten.convolution_backward(
            b,
            x.to(b.dtype),
            weight.to(b.dtype),
            [b.shape[1]],
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * size,
            self.groups,
            [False, self.weight, self.bias],
        )
        return [g for g in (weight_gradient, bias_gradient) if g is not None]

    def row_gradients(
        self, b: Tensor, saved: Sequence[Tensor], keep: int | None
    ) -> list[RowGradients]:
        """Contracted for the weight, formed for the bias."""
        x = saved[0]
        result = []
        if self.weight:
            only_weight = Convolution(
                True, False, self.stride, self.padding, self.dilation, self.groups
            )

            def dots(direction: Tensor) -> Tensor:
                return row_dots(b, self._convolve(x.to(b.dtype), direction.to(b.dtype)))

            result.append(
                contracted(lambda w: only_weight.gradients(scale_rows(b, w), saved)[0], dots)
            )
        if self.bias:
            result.append(formed(b.flatten(2).sum(2)))
        return result

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(self.stride) - 1]
        return convolve(x, weight, None, self.stride, self.padding, self.dilation, self.groups)


def _cheaper_formed(entries: int, tokens: int, b: Tensor) -> bool:
    """Whether to form the gradient of each row, of so many entries."""
    if b.device.type != "cpu":
        return tokens >= FORM_OFF_CPU_FROM
    return tokens >= (FORM_SMALL_FROM if entries <= SMALL_WEIGHT else FORM_FROM)
