"""The state that the taps of one micro-batch share, and the tap itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilevel import tree
from bilevel.autodiff.torch_private import function_modes_off
from bilevel.lower.ghost.rows import RowGradients, vector
from bilevel.lower.guard import LOOKS, Guard
from bilevel.problem import dropped


class Use(Protocol):
    """One use of parameters by an operation, as a function of its output gradient b."""

    def gradients(self, b: Tensor, saved: Sequence[Tensor]) -> list[Tensor]:
        """Return the parameters' gradients exactly as autograd computes them."""

    def row_gradients(
        self, b: Tensor, saved: Sequence[Tensor], keep: int | None
    ) -> list[RowGradients]:
        """Return the parameters' gradients per row.

        Args:
            b: The gradient of the output, [rows, ...].
            saved: The tensors that the forward pass saved.
            keep: None if the gradients are used at once and dropped. Otherwise they are kept, and
                formed only if they have at most this many entries.
        """


# A direction in parameter space, leaf by leaf.
Direction: TypeAlias = Sequence[Tensor | None]


@dataclass(frozen=True, eq=False)
class Tracked:
    """A parameter, or the image of one or several under an affine map, such as a view or a cast.

    Attributes:
        leaves: The indices of the parameters among all parameters.
        visible: The tensor that the loss sees.
        value: The same values without a graph.
        shadow: The same values with a graph that ends in the leaves that collect gradients.
        tangent: The linear part of the map, to be applied to a direction in parameter space; None
            if none of the parameters moves.
    """

    leaves: tuple[int, ...]
    visible: Tensor
    value: Tensor
    shadow: Tensor
    tangent: Callable[[Direction], Tensor | None]


_MARKER = (0, 1, 0, 1, 0, 1)


def at_once(dots: Tensor) -> bool:
    """Return whether products are added use by use: not where each addition is a launch.

    There gradients of vectors (biases, norms, scales) are kept until the end, too, and are then
    summed and multiplied together.
    """
    return dots.is_cpu


class Context:
    """The weights, owners and direction of one micro-batch; it collects the per-example products.

    The caller sets it up by ``weight`` between the forward and the backward pass. Without that call
    the backward pass is an ordinary one, and the loss itself must be weighted. ``PerExample``
    explains ``entries_limit``; ``guard`` decides what depends on values.
    """

    def __init__(self, entries_limit: int, guard: Guard = LOOKS) -> None:
        self._guard = guard
        self.weights: Tensor | None = None
        self._dots: Tensor | None = None
        # By rows and precision: the weights of the rows, and products that are still to be added.
        self._of_rows: dict[tuple[int, torch.dtype], Tensor] = {}
        self._terms: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        self._vectors: dict[tuple[int, torch.dtype], list[tuple[Tensor, Tracked]]] = {}
        self._direction: Direction | None = None
        self._keep: int | None = None
        self._entries_limit = entries_limit
        self._all_one = False
        self._dropped: Tensor | None = None
        self._owners: Mapping[int, Tensor] = {}
        self._pending: list[tuple[RowGradients, Tracked, int]] = []

    def weight(
        self,
        weights: Float[Tensor, " batch"],
        owners: Mapping[int, Int[Tensor, " rows"]],
        direction: Direction | None,
        keep: bool,
        losses: Float[Tensor, " batch"] | None = None,
    ) -> None:
        """Request gradients weighted per example, and products with a direction.

        If all weights are exactly 1, the gradients are computed by autograd's own kernels.

        Args:
            weights: The weights of the examples, [batch].
            owners: The example of each row, by the number of rows.
            direction: The direction of the products, or None.
            keep: Whether per-row gradients are kept for products with a later direction.
            losses: The losses, by which examples without a part in the step are known (``dropped``
                of ``bilevel.problem``): their rows are left out. None: there are none.
        """
        self.weights, self._direction = weights, direction
        self._keep = self._entries_limit if keep else None
        self._owners = owners
        gone = torch.zeros_like(weights, dtype=torch.bool)
        if losses is not None:
            gone = dropped(weights, losses.detach())
        self._all_one, any_gone = self._guard.weights((weights == 1.0).all(), gone.any())
        self._dropped = gone if any_gone else None
        self._dots = weights.new_zeros(weights.shape, dtype=tree.wide_dtype(weights.dtype))
        self._of_rows, self._terms, self._vectors = {}, {}, {}

    @property
    def dots(self) -> Float[Tensor, " batch"]:
        """The products that were recorded so far."""
        assert self._dots is not None
        for (rows, _), terms in self._terms.items():
            total = torch.stack(terms).sum(0, dtype=self._dots.dtype)
            self._dots += self._per_example(total, self._owners.get(rows))
        self._terms = {}
        return self._dots

    def late_gradients(self) -> list[tuple[int, Tensor]]:
        """Record the products of the vectors that were kept; return gradients, by parameter."""
        found = []
        for (rows, dtype), uses in self._vectors.items():
            joined = torch.cat([flat for flat, _ in uses], 1)
            along = [self._along(entry) for _, entry in uses]
            if self._direction is not None:
                pieces = [vector(one, joined) for one in along if one is not None]
                self._add(joined.mv(torch.cat(pieces)), rows)
            if not self._all_one:
                weighted = self._weights_of(rows, dtype).matmul(joined)
                parts = weighted.split([flat.shape[1] for flat, _ in uses])
                found += [
                    (entry.leaves[0], part.to(entry.value.dtype))
                    for part, (_, entry) in zip(parts, uses, strict=True)
                ]
        self._vectors = {}
        return found

    def later_dots(self, direction: Direction) -> Float[Tensor, " batch"]:
        """Return the products [batch] from the gradients that were kept, and release these."""
        for row, entry, rows in self._pending:
            dots = row.sums(None, entry.tangent(direction))[1]
            if dots is not None:
                self._add(dots, rows)
        self._pending = []
        return self.dots

    def backward(
        self, use: Use, b: Tensor, saved: Sequence[Tensor], entries: Sequence[Tracked]
    ) -> list[Tensor | None]:
        """Return the gradients of a use's parameters, in their dtype, and record the products.

        None: ``late_gradients`` has it.
        """
        if self.weights is None:
            return _cast(use.gradients(b, saved), entries)
        if self._dropped is not None:
            b, saved = self._without_dropped(b, saved)
        plain = use.gradients(b, saved) if self._all_one else None
        if plain is not None and self._keep is None and self._direction is None:
            return _cast(plain, entries)
        weights = self._weights_of(len(b), b.dtype) if plain is None else None
        result: list[Tensor | None] = []
        rows = use.row_gradients(b, saved, self._keep)
        for row, entry in zip(rows, entries, strict=True):
            if row.flat is not None and self._waits(entry, b):
                self._vectors.setdefault((len(b), row.flat.dtype), []).append((row.flat, entry))
                result.append(None)
                continue
            weighted, dots = row.sums(weights, self._along(entry))
            if dots is not None:
                self._add(dots, len(b))
            if self._keep is not None:
                self._pending.append((row, entry, len(b)))
            result.append(weighted)
        return _cast(result if plain is None else plain, entries)

    def _waits(self, entry: Tracked, b: Tensor) -> bool:
        """Return whether a use of a parameter itself, a vector, waits until the end."""
        itself = entry.value.dim() == 1 and entry.shadow.is_leaf
        moves = self._direction is None or self._along(entry) is not None
        return itself and moves and self._keep is None and not at_once(b)

    def _without_dropped(
        self, b: Tensor, saved: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Return zeros in the rows of dropped examples, and nothing that makes NaN of 0."""
        assert self._dropped is not None
        owner = self._owners.get(len(b))
        rows = self._dropped if owner is None else self._dropped[owner]
        b = b.masked_fill(rows.view(-1, *[1] * (b.dim() - 1)), 0.0)
        finite = [
            torch.nan_to_num(one, 0.0, 0.0, 0.0) if one.is_floating_point() else one
            for one in saved
        ]
        return b, finite

    def _along(self, entry: Tracked) -> Tensor | None:
        return None if self._direction is None else entry.tangent(self._direction)

    def _weights_of(self, rows: int, dtype: torch.dtype) -> Tensor:
        """Return the weights of so many rows, which are put together once."""
        key = rows, dtype
        if key not in self._of_rows:
            assert self.weights is not None
            owner = self._owners.get(rows)
            weights = self.weights if owner is None else self.weights[owner]
            self._of_rows[key] = weights.to(dtype)
        return self._of_rows[key]

    def _add(self, dots: Tensor, rows: int) -> None:
        """Record the products of a use, which are added to those of the others, or later are."""
        assert self._dots is not None
        if at_once(dots):
            self._dots += self._per_example(dots, self._owners.get(rows))
        else:
            self._terms.setdefault((rows, dots.dtype), []).append(dots)

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
        """Return the output; ``tensors`` are those saved for the use, then the entries' shadows."""
        ctx.use, ctx.context, ctx.entries = use, context, entries
        # Activation checkpointing recomputes saved tensors by another run of the model. If that
        # run has no taps, the marker's unusual shape makes checkpointing detect the difference.
        ctx.save_for_backward(output.new_empty(_MARKER), *tensors[:saved])
        return output.detach()

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> Any:
        """Return b itself for the output, and the shadows' gradients."""
        _, *saved = ctx.saved_tensors  # Unpacked once: checkpointing allows no second time.
        with function_modes_off():  # They are there for what is recomputed, not for this.
            gradients = ctx.context.backward(ctx.use, b, saved, ctx.entries)
        return b, None, None, None, None, *([None] * len(saved)), *gradients


def _cast(gradients: Sequence[Tensor | None], entries: Sequence[Tracked]) -> list[Tensor | None]:
    return [
        None if gradient is None else gradient.to(entry.value.dtype)
        for gradient, entry in zip(gradients, entries, strict=True)
    ]
