"""Elementwise uses of parameters: scales, shifts and slices. See ``uses``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.lower.ghost.rows import (
    RowGradients,
    contracted,
    formed,
    row_dots,
    scale_rows,
    sum_tokens,
)


@dataclass(frozen=True)
class Normalised:
    """``y = weight · x̂ + bias``, where ``normalise`` recomputes x̂ from the saved x.

    Args:
        weight: Whether the weight is tracked.
        bias: Whether the bias is tracked.
        shape: The shape of both parameters.
        channels: Whether the parameters belong to dimension 1 (group norm). Otherwise they
            broadcast over the leading dimensions of x̂ (layer norm, RMS norm).
        normalise: The function from x to x̂.
        kernel: The function from (b, x) to autograd's gradients of both parameters. None means that
            products and sums compute them.
    """

    weight: bool
    bias: bool
    shape: torch.Size
    normalise: Callable[[Tensor], Tensor]
    kernel: Callable[[Tensor, Tensor], tuple[Tensor | None, Tensor | None]] | None = None
    channels: bool = False

    def gradients(self, b: Tensor, saved: Sequence[Tensor]) -> list[Tensor]:
        """Return autograd's gradients, by its kernel if there is one."""
        (x,) = saved
        if self.kernel is not None:
            return [gradient for gradient in self.kernel(b, x) if gradient is not None]
        result = [(b * self.normalise(x).to(b.dtype)).sum_to_size(self.shape)] * self.weight
        return result + [b.sum_to_size(self.shape)] * self.bias

    def row_gradients(
        self, b: Tensor, saved: Sequence[Tensor], keep: int | None
    ) -> list[RowGradients]:
        """Return formed gradients, which are small."""
        (x,) = saved
        result = []
        if self.weight:
            result.append(formed(self._reduce(b * self.normalise(x).to(b.dtype))))
        if self.bias:
            result.append(formed(self._reduce(b)))
        return result

    def _reduce(self, rows: Tensor) -> Tensor:
        if self.channels:
            return rows.flatten(2).sum(2) if rows.dim() > 2 else rows
        return sum_tokens(rows, self.shape)


@dataclass(frozen=True)
class Broadcast:
    """``y = factor · p`` or ``y = x ± p``, with p broadcast to y; only the factor is saved."""

    shape: torch.Size
    sign: float = 1.0

    def gradients(self, b: Tensor, saved: Sequence[Tensor]) -> list[Tensor]:
        """Return autograd's gradient: multiply, then sum to the parameter's shape."""
        return [self._times(b, saved).sum_to_size(self.shape)]

    def row_gradients(
        self, b: Tensor, saved: Sequence[Tensor], keep: int | None
    ) -> list[RowGradients]:
        """Return formed gradients or, if the parameter has rows itself, one row for each row."""
        entries = self._times(b, saved)
        own_rows = len(self.shape) == b.dim() and self.shape[0] == len(b) and len(b) > 1
        if not own_rows:
            inner = self.shape[1:] if len(self.shape) == b.dim() else self.shape
            return [formed(sum_tokens(entries, inner), self.shape)]

        def weighted(weights: Tensor) -> Tensor:
            return scale_rows(entries, weights).sum_to_size(self.shape)

        def dots(mu: Tensor) -> Tensor:
            return row_dots(entries, mu.to(entries.dtype).expand_as(entries))

        return [contracted(weighted, dots)]

    def _times(self, b: Tensor, saved: Sequence[Tensor]) -> Tensor:
        if saved:
            return b * saved[0].to(b.dtype)
        return b if self.sign == 1.0 else -b


@dataclass(frozen=True)
class Concatenated:
    """``y = cat([..., p, ...], dim)`` with dim > 0, where p is the slice of y from ``start`` on."""

    dim: int
    start: int
    shape: torch.Size

    def gradients(self, b: Tensor, saved: Sequence[Tensor]) -> list[Tensor]:
        """Return autograd's gradient, the slice of b."""
        return [b.narrow(self.dim, self.start, self.shape[self.dim])]

    def row_gradients(
        self, b: Tensor, saved: Sequence[Tensor], keep: int | None
    ) -> list[RowGradients]:
        """Return one row of the gradient for each row, since row r depends on row r of p alone."""
        (entries,) = self.gradients(b, saved)
        return [
            contracted(
                lambda weights: scale_rows(entries, weights),
                lambda mu: row_dots(entries, mu.to(entries.dtype)),
            )
        ]
