"""What the taps of one micro-batch share, and the tap itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilevel import tree
from bilevel.lower.ghost.rows import RowGradients


class Use(Protocol):
    """One use of parameters by an operation, seen from its output gradient b."""

    def gradients(self, b: Tensor, saved: Sequence[Tensor]) -> list[Tensor]:
        """Return the parameters' gradients exactly as autograd computes them."""

    def row_gradients(
        self, b: Tensor, saved: Sequence[Tensor], keep: int | None
    ) -> list[RowGradients]:
        """Return the parameters' gradients per row.

        Args:
            b: Gradient of the output, [rows, ...].
            saved: What was saved in the forward pass.
            keep: None if they are used at once and dropped; else they are kept, formed only up to
                this many entries.
        """


@dataclass(frozen=True, eq=False)
class Tracked:
    """A parameter, or what a view, a cast or another linear map has made of one.

    Attributes:
        leaf: Index of the parameter among all of them.
        visible: The tensor that the loss sees.
        value: The same without a graph.
        shadow: The same, with a graph that ends in the leaf that collects gradients.
        tangent: Applies the linear map to a direction in parameter space.
    """

    leaf: int
    visible: Tensor
    value: Tensor
    shadow: Tensor
    tangent: Callable[[Tensor], Tensor]


_MARKER = (0, 1, 0, 1, 0, 1)
Pending = tuple[int, Callable[[Tensor], Tensor]]


class Context:
    """Weights, owners and direction of one micro-batch; gathers the per-example products.

    Set up by the pass between forward and backward: without a call of ``weight`` it is an
    ordinary backward pass (the loss itself being weighted). ``entries_limit``: see ``PerExample``.
    """

    def __init__(self, entries_limit: int) -> None:
        self.weights: Tensor | None = None
        self.dots: Tensor | None = None
        self._direction: Sequence[Tensor | None] | None = None
        self._keep: int | None = None
        self._entries_limit = entries_limit
        self._all_one = False
        self._owners: Mapping[int, Tensor] = {}
        self._pending: list[Pending] = []

    def weight(
        self,
        weights: Float[Tensor, " batch"],
        owners: Mapping[int, Int[Tensor, " rows"]],
        direction: Sequence[Tensor | None] | None,
        keep: bool,
    ) -> None:
        """Ask for gradients weighted per example, and products with ``direction`` or, kept, later.

        If the weights are all exactly 1, the gradients come from autograd's own kernels.
        """
        self.weights, self._direction = weights, direction
        self._keep = self._entries_limit if keep else None
        self._owners = owners
        self._all_one = bool((weights == 1.0).all())
        self.dots = weights.new_zeros(weights.shape, dtype=tree.wide_dtype(weights.dtype))

    def later_dots(self, direction: Sequence[Tensor | None]) -> Float[Tensor, " batch"]:
        """Return the products [batch] from what was kept, and forget it."""
        assert self.dots is not None
        for leaf, dots in self._pending:
            along = direction[leaf]
            if along is not None:
                self.dots += dots(along)
        self._pending = []
        return self.dots

    def backward(
        self, use: Use, b: Tensor, saved: Sequence[Tensor], entries: Sequence[Tracked]
    ) -> list[Tensor]:
        """Return the gradients of a use's parameters, in their dtype; note the products."""
        if self.weights is None:
            return _cast(use.gradients(b, saved), entries)
        plain = use.gradients(b, saved) if self._all_one else None
        if plain is not None and self._keep is None and self._direction is None:
            return _cast(plain, entries)
        owner = self._owners.get(len(b))
        weights = None
        if plain is None:
            weights = (self.weights if owner is None else self.weights[owner]).to(b.dtype)
        result = []
        rows = use.row_gradients(b, saved, self._keep)
        for row, entry in zip(rows, entries, strict=True):
            weighted, dots = row.sums(weights, self._along(entry))
            if dots is not None:
                self._add(dots, owner)
            if self._keep is not None:
                self._pending.append((entry.leaf, self._later(row, entry, owner)))
            if weighted is not None:
                result.append(weighted)
        return _cast(result if plain is None else plain, entries)

    def _along(self, entry: Tracked) -> Tensor | None:
        direction = None if self._direction is None else self._direction[entry.leaf]
        return None if direction is None else entry.tangent(direction)

    def _later(
        self, row: RowGradients, entry: Tracked, owner: Tensor | None
    ) -> Callable[[Tensor], Tensor]:
        def dots(direction: Tensor) -> Tensor:
            products = row.sums(None, entry.tangent(direction))[1]
            assert products is not None
            return self._per_example(products, owner)

        return dots

    def _add(self, dots: Tensor, owner: Tensor | None) -> None:
        assert self.dots is not None
        self.dots += self._per_example(dots, owner)

    def _per_example(self, dots: Tensor, owner: Tensor | None) -> Tensor:
        if owner is None:
            return dots
        assert self.weights is not None
        return dots.new_zeros(len(self.weights)).index_add_(0, owner, dots)


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
        """``tensors``: what the use saves for its backward pass, then the entries' shadows."""
        ctx.use, ctx.context, ctx.entries = use, context, entries
        # Activation checkpointing fills in what is saved here by running the model again. If it
        # does so without taps, the marker, like nothing that torch saves, makes it notice.
        ctx.save_for_backward(output.new_empty(_MARKER), *tensors[:saved])
        return output.detach()

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> Any:
        """Return b itself for the output, and the shadows' gradients."""
        _, *saved = ctx.saved_tensors  # once: checkpointing gives them out only once
        gradients = ctx.context.backward(ctx.use, b, saved, ctx.entries)
        return b, None, None, None, None, *([None] * len(saved)), *gradients


def _cast(gradients: list[Tensor], entries: Sequence[Tracked]) -> list[Tensor]:
    return [g.to(entry.value.dtype) for g, entry in zip(gradients, entries, strict=True)]
