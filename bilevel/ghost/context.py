"""What the taps of one micro-batch share, and the tap itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowGradients:
    """Gradients of one parameter, one per row of the leading dimension, formed or not.

    Attributes:
        weighted: row weights [rows] -> Σ_r weight_r · gradient_r, shaped like the parameter.
        dots: direction, shaped like the parameter -> ⟨direction, gradient_r⟩, [rows].
    """

    weighted: Callable[[Tensor], Tensor]
    dots: Callable[[Tensor], Tensor]


class Use(Protocol):
    """One use of parameters by an operation, seen from its output gradient b."""

    def gradients(self, b: Tensor, saved: Sequence[Tensor]) -> list[Tensor]:
        """Return the parameters' gradients exactly as autograd computes them."""

    def row_gradients(
        self, b: Tensor, saved: Sequence[Tensor], entries_limit: int
    ) -> list[RowGradients]:
        """Return the parameters' gradients per row."""


@dataclass(frozen=True, eq=False)
class Tracked:
    """A parameter, or what a view, a cast or another linear map has made of one.

    Attributes:
        name: The parameter's path.
        visible: The tensor that the loss sees.
        value: The same without a graph.
        shadow: The same, with a graph that ends in the leaf that collects gradients.
        tangent: Applies the linear map to a direction in parameter space.
    """

    name: str
    visible: Tensor
    value: Tensor
    shadow: Tensor
    tangent: Callable[[Tensor], Tensor]


Pending = tuple[str, Callable[[Tensor], Tensor]]


class Context:
    """Weights, owners and direction of one micro-batch; gathers the per-example products.

    Set up by the pass between forward and backward: `weights` stays None for an ordinary backward
    pass (the loss itself being weighted); `direction` maps parameter paths to μ if it is known.
    """

    def __init__(self, entries_limit: int) -> None:
        self.entries_limit = entries_limit
        self.weights: Tensor | None = None
        self.direction: Mapping[str, Tensor] | None = None
        self.dots: Tensor | None = None
        self._keep = False
        self._all_one = False
        self._owners: Mapping[int, Tensor] = {}
        self._pending: list[Pending] = []

    def weight(
        self,
        weights: Tensor,
        owners: Mapping[int, Tensor],
        direction: Mapping[str, Tensor] | None,
        keep: bool,
    ) -> None:
        """Ask for gradients weighted per example, and products with `direction` or, kept, later.

        Weights that are all exactly 1 ask for nothing but autograd's own kernels.
        """
        self.weights, self.direction, self._keep = weights, direction, keep
        self._owners = owners
        self._all_one = bool((weights == 1.0).all())
        self.dots = weights.new_zeros(weights.shape, dtype=_wide(weights.dtype))

    def later_dots(self, direction: Mapping[str, Tensor]) -> Tensor:
        """Return the products [batch] from what was kept, and forget it."""
        assert self.dots is not None
        for name, dots in self._pending:
            if name in direction:
                self._add(dots(direction[name]))
        self._pending = []
        return self.dots

    def backward(
        self, use: Use, b: Tensor, saved: Sequence[Tensor], entries: Sequence[Tracked]
    ) -> list[Tensor]:
        """Return the gradients of a use's parameters, in their dtype; note the products."""
        if self.weights is None or (self._all_one and not self._wants_dots):
            return _cast(use.gradients(b, saved), entries)
        owner = self._owners.get(len(b))
        rows = use.row_gradients(b, saved, self.entries_limit)
        for row, entry in zip(rows, entries, strict=True):
            self._note(row, entry, owner)
        if self._all_one:
            return _cast(use.gradients(b, saved), entries)
        weights = (self.weights if owner is None else self.weights[owner]).to(b.dtype)
        return _cast([row.weighted(weights) for row in rows], entries)

    @property
    def _wants_dots(self) -> bool:
        return self._keep or self.direction is not None

    def _note(self, row: RowGradients, entry: Tracked, owner: Tensor | None) -> None:
        def dots(direction: Tensor) -> Tensor:
            return self._per_example(row.dots(entry.tangent(direction)), owner)

        if self._keep:
            self._pending.append((entry.name, dots))
        elif self.direction is not None and entry.name in self.direction:
            self._add(dots(self.direction[entry.name]))

    def _per_example(self, dots: Tensor, owner: Tensor | None) -> Tensor:
        if owner is None:
            return dots
        assert self.weights is not None
        return dots.new_zeros(len(self.weights)).index_add_(0, owner, dots)

    def _add(self, dots: Tensor) -> None:
        assert self.dots is not None
        self.dots += dots


class Tap(torch.autograd.Function):
    """Identity whose backward pass computes the gradients of the parameters behind it."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        use: Use,
        context: Context,
        entries: Sequence[Tracked],
        saved: int,
        *tensors: Tensor,
    ) -> Tensor:
        """`tensors`: what the use saves for its backward pass, then the entries' shadows."""
        ctx.use, ctx.context, ctx.entries = use, context, entries
        ctx.save_for_backward(*tensors[:saved])
        return output.detach()

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> Any:
        """Return b itself for the output, and the shadows' gradients."""
        gradients = ctx.context.backward(ctx.use, b, ctx.saved_tensors, ctx.entries)
        return b, None, None, None, None, *([None] * len(ctx.saved_tensors)), *gradients


def _cast(gradients: list[Tensor], entries: Sequence[Tracked]) -> list[Tensor]:
    return [g.to(entry.value.dtype) for g, entry in zip(gradients, entries, strict=True)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
