"""Uses of parameters by operations: gradients, per-row gradients and their products with μ.

Rows are the leading dimension of b, and tokens all dimensions between rows and channels.
``gradients`` runs the kernels of autograd's own backward formulas, so that it reproduces an
ordinary training step bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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

# From this number of tokens per row, forming a row's gradient by a matrix product, which the
# weighted gradient uses again, costs less than contracting with μ. The limits were measured on a
# CPU, for weights of up to SMALL_WEIGHT entries and for larger ones. The limit for other
# devices, where memory traffic costs more, follows from counting operations.
FORM_SMALL_FROM = 12
FORM_FROM = 40
FORM_OFF_CPU_FROM = 512
SMALL_WEIGHT = 1 << 16


@dataclass(frozen=True)
class Linear:
    """``y = x Wᵀ + bias`` or, transposed, ``y = x W + bias``; it saves x [rows, ..., in].

    Either parameter may be missing (frozen). Per row, the gradient of W is Σ_tokens b xᵀ, and its
    product with μ is Σ_tokens b·(μ x).

    Args:
        weight: Whether the weight is tracked.
        bias: Whether the bias is tracked.
        transposed: Whether W is [in, out].
        by_columns: Whether such a W lies in memory column by column, as ``weight.T`` does. autograd
            then forms the transpose of its gradient.
    """

    weight: bool
    bias: bool
    transposed: bool = False
    by_columns: bool = False

    def gradients(self, b: Tensor, saved: Sequence[Tensor]) -> list[Tensor]:
        """Return autograd's gradients, by one matrix product over all rows and tokens."""
        b_flat = b.reshape(-1, b.shape[-1])
        result = []
        if self.weight:
            form = replace(self, transposed=self.transposed and not self.by_columns)
            gradient = form._weight_gradient(b_flat, saved[0])
            result.append(gradient.t() if self.by_columns else gradient)
        if self.bias:
            result.append(b_flat.sum(0))
        return result

    def row_gradients(
        self, b: Tensor, saved: Sequence[Tensor], keep: int | None
    ) -> list[RowGradients]:
        """Return gradients formed by batched matrix products, or contracted if that is cheaper."""
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
    """``y = x w`` with a vector w; it saves x [rows, ..., in]."""

    def gradients(self, b: Tensor, saved: Sequence[Tensor]) -> list[Tensor]:
        """Return autograd's gradient, by one matrix-vector product over all rows and tokens."""
        x = saved[0].to(b.dtype)
        return [x.reshape(-1, x.shape[-1]).t().mv(b.reshape(-1))]

    def row_gradients(
        self, b: Tensor, saved: Sequence[Tensor], keep: int | None
    ) -> list[RowGradients]:
        """Return formed gradients, which are small."""
        x_rows = saved[0].to(b.dtype).reshape(len(b), -1, saved[0].shape[-1])
        return [formed(b.reshape(len(b), 1, -1).bmm(x_rows).squeeze(1))]


@dataclass(frozen=True)
class Embedding:
    """``y = W[index]``; it saves the index [rows, ...]."""

    count: int
    padding_index: int
    scale_by_frequency: bool

    def gradients(self, b: Tensor, saved: Sequence[Tensor]) -> list[Tensor]:
        """Return autograd's gradient, the sum of the rows of b by index."""
        return [
            torch.ops.aten.embedding_dense_backward(
                b, saved[0], self.count, self.padding_index, self.scale_by_frequency
            )
        ]

    def row_gradients(
        self, b: Tensor, saved: Sequence[Tensor], keep: int | None
    ) -> list[RowGradients]:
        """Return gradients that are contracted with the rows of μ at the index."""
        (index,) = saved

        def dots(direction: Tensor) -> Tensor:
            along = direction.to(b.dtype)[index]
            if self.padding_index >= 0:
                along = along.masked_fill((index == self.padding_index)[..., None], 0.0)
            return row_dots(b, along)

        return [contracted(lambda w: self.gradients(scale_rows(b, w), saved)[0], dots)]


@dataclass(frozen=True)
class Convolution:
    """A 1-, 2- or 3-dimensional convolution; it saves x [rows, in, ...] and the weight.

    The product with μ is Σ b·conv(x, μ), which costs one more convolution.
    """

    weight: bool
    bias: bool
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def gradients(self, b: Tensor, saved: Sequence[Tensor]) -> list[Tensor]:
        """Return autograd's gradients, by its kernel."""
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
        """Return a contracted gradient of the weight and a formed one of the bias."""
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
    """Return whether forming each row's gradient, with this number of entries, is cheaper."""
    if b.device.type != "cpu":
        return tokens >= FORM_OFF_CPU_FROM
    return tokens >= (FORM_SMALL_FROM if entries <= SMALL_WEIGHT else FORM_FROM)
