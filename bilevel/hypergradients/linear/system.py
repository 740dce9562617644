"""What a linear solver is given, and what it hands back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import optree
import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import tree
from bilevel.tree import Tree

MatVec: TypeAlias = Callable[[Tree], Tree]


class LinearSolution(NamedTuple):
    """An approximate solution of (A + δ I) x = b.

    Attributes:
        solution: x like b; 16-bit leaves of b come back in float32.
        residual: ‖b − (A + δ I) x‖ / ‖b‖, from a product with x, not from a recurrence; NaN if
            that product is not finite. 0 for an exact solution, 1 for x = 0.
        iterations: Steps of the method; 0 if b = 0.
        products: Products with A that were spent, the last for the residual.
        notes: Why the method stopped early, and what was left out.
    """

    solution: Tree
    residual: float
    iterations: int
    products: int
    notes: tuple[str, ...] = ()


class LinearSolver(Protocol):
    """A way to solve A x = b for a symmetric A that is known only by its products."""

    def solve(self, matvec: MatVec, rhs: Tree, initial: Tree | None = None) -> LinearSolution:
        """Return x with (A + δ I) x ≈ b, δ being the solver's damping.

        Args:
            matvec: v -> A v for trees like ``rhs``.
            rhs: b; None leaves are not part of the system.
            initial: Where to start (a warm start); None: 0.
        """


class System:
    """(A + δ I) y = b / ‖b‖: the system with a right-hand side of length 1.

    Lengths are divided out so that inner products neither under- nor overflow. Vectors are at
    least float32: 16-bit leaves would lose the recurrences of every method. Products are counted.
    """

    def __init__(self, matvec: MatVec, rhs: Tree, damping: float) -> None:
        self._matvec, self._damping = matvec, damping
        self.products = 0
        wide = tree.map(_wide, rhs)
        entries = [leaf.abs().max().double() for leaf in tree.leaves(wide) if leaf.numel()]
        largest = 0.0
        if entries:  # the maximum of anything and NaN is NaN
            largest = float(torch.stack([entry.to(entries[0].device) for entry in entries]).max())
        self.rhs = wide
        self.size = largest
        if 0.0 < largest < math.inf:
            scaled = tree.map(lambda leaf: leaf / largest, wide)
            length = float(tree.norm(scaled))
            self.rhs = tree.map(lambda leaf: leaf / length, scaled)
            self.size = largest * length

    @property
    def eps(self) -> float:
        """Return the machine epsilon of the least precise leaf."""
        return max(torch.finfo(leaf.dtype).eps for leaf in tree.leaves(self.rhs))

    def answer_without_solving(self) -> LinearSolution | None:
        """Return 0 for b = 0, NaN where b is not finite, None where there is work to do."""
        if self.size == 0.0:
            return LinearSolution(tree.zeros_like(self.rhs), 0.0, 0, 0)
        if not math.isfinite(self.size):
            note = "the right-hand side is not finite: no system was solved"
            unknown = tree.map(lambda leaf: torch.full_like(leaf, math.nan), self.rhs)
            return LinearSolution(unknown, math.nan, 0, 0, (note,))
        return None

    def undamped(self, vector: Tree) -> Tree:
        """Return A v, in the precision of the system."""
        self.products += 1
        return self._combined(self._matvec(vector), vector, 0.0)

    def product(self, vector: Tree) -> Tree:
        """Return (A + δ I) v."""
        self.products += 1
        return self._combined(self._matvec(vector), vector, self._damping)

    def _combined(self, image: Tree, vector: Tree, damping: float) -> Tree:
        def combine(entry: Tensor | None, product: Tensor | None) -> Tensor | None:
            if entry is None or product is None:
                return None if entry is None else entry * damping
            wide = product.to(entry.dtype)
            return wide if damping == 0.0 else wide + damping * entry

        result: Tree = optree.tree_map(combine, vector, image, none_is_leaf=True)
        return result

    def start(self, initial: Tree | None) -> tuple[Tree, Tree, tuple[str, ...]]:
        """Return y, its residual, and a note if ``initial`` is worse than 0 and was dropped."""
        zero = tree.zeros_like(self.rhs)
        if initial is None:
            return zero, self.rhs, ()
        guess = tree.map(lambda leaf, like: leaf.to(like.dtype) / self.size, initial, self.rhs)
        if tree.norm(guess) == 0.0:
            return zero, self.rhs, ()
        residual = tree.axpy(-1.0, self.product(guess), self.rhs)
        length = float(tree.norm(residual))
        if length <= 1.0:
            return guess, residual, ()
        return zero, self.rhs, (f"the warm start was dropped: residual {length:.2g}, 0 has 1",)

    def finish(self, solution: Tree, iterations: int, notes: tuple[str, ...]) -> LinearSolution:
        """Measure the residual by a product and bring the length of b back."""
        image = self.product(solution)
        residual = float(tree.norm(tree.axpy(-1.0, image, self.rhs)))
        if not math.isfinite(residual):
            residual = math.nan
            notes += ("a product with the solution is not finite",)
        elif residual > 1.0 + 1e-3:
            notes += (f"the solution is worse than 0: residual {residual:.2g}",)
        scaled = tree.scale(self.size, solution)
        return LinearSolution(scaled, residual, iterations, self.products, notes)


def _wide(leaf: Tensor) -> Tensor:
    return leaf.detach().to(tree.wide_dtype(leaf.dtype))


def flat(vector: Tree) -> Float[Tensor, " entries"]:
    """Return all entries in one tensor, in the widest dtype, on the first's device."""
    pieces = tree.leaves(vector)
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in pieces) else torch.float32
    return torch.cat([piece.reshape(-1).to(pieces[0].device, dtype) for piece in pieces])


def unflat(entries: Float[Tensor, " entries"], like: Tree) -> Tree:
    """Return the tree that ``flat`` took apart, with the dtypes and devices of ``like``."""
    sizes = [leaf.numel() for leaf in tree.leaves(like)]
    pieces: Any = iter(torch.split(entries, sizes))
    return tree.map(lambda leaf: next(pieces).view(leaf.shape).to(leaf), like)
