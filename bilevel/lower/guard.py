"""Who decides what depends on the values of a step: the host, which looks, or the device alone.

A step goes on as usual if its gradients are finite, and otherwise leaves something out. To look is
to wait until the device has done all that it was given. A ``Late`` guard does not look: every step
goes on as if all were usual, the device keeps whether it was, and what a step has changed counts
only if it was so in this step and in all before it (``kept``). Once it was not, nothing moves any
more; whoever reads the guard finds θ, φ and both optimizers as they were before that step, and
takes it again with a guard that looks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bilevel import tree
from bilevel.tree import TreeT

Others: TypeAlias = Callable[[], Sequence[Tensor | None]]


class Guard(Protocol):
    """What a step asks whether it goes on as usual."""

    @property
    def usual(self) -> Bool[Tensor, ""] | None:
        """Whether all was usual so far, on the device; None where the host has looked."""

    def holds(self, condition: Bool[Tensor, ""]) -> bool:
        """Return whether a condition holds under which a step goes on as usual."""

    def lower(self, norm: Float[Tensor, ""], others: Others) -> bool:
        """Return whether a lower step may be taken: the norm of its gradient is finite.

        Args:
            norm: The norm.
            others: Returns what else is finite in a usual step, loss and weights; None: nothing.
        """

    def upper(self, norm: Float[Tensor, ""], loss: Float[Tensor, ""]) -> None:
        """Be told the norm of a hypergradient and its upper loss, before anything moves."""

    def weights(self, all_one: Bool[Tensor, ""], any_dropped: Bool[Tensor, ""]) -> list[bool]:
        """Return whether all weights are exactly 1, and whether an example has no part in the step.

        Weights that are said not to be 1 may be: multiplied by 1, a gradient differs by rounding.
        """


class Looks:
    """The guard of a host that looks at every value before it goes on."""

    usual = None

    def holds(self, condition: Bool[Tensor, ""]) -> bool:
        """Return the value of the condition, for which the host waits."""
        return bool(condition)

    def lower(self, norm: Float[Tensor, ""], others: Others) -> bool:
        """Return whether the norm of the gradient is finite."""
        return math.isfinite(norm)

    def upper(self, norm: Float[Tensor, ""], loss: Float[Tensor, ""]) -> None:
        """Do nothing: the solver looks at them before the upper step."""

    def weights(self, all_one: Bool[Tensor, ""], any_dropped: Bool[Tensor, ""]) -> list[bool]:
        """Return both values, for which the host waits once."""
        values: list[bool] = torch.stack([all_one, any_dropped]).tolist()
        return values


LOOKS = Looks()


class Late:
    """The guard of steps that go on without looking.

    Args:
        usual: Whether all was usual in the steps before, a scalar on the device.
        largest: The largest norm of a hypergradient that is usual, likewise; None: any.
        all_one: Whether it is usual that all weights are exactly 1.
    """

    def __init__(
        self,
        usual: Bool[Tensor, ""],
        largest: Float[Tensor, ""] | None = None,
        all_one: bool = False,
    ) -> None:
        self.usual: Bool[Tensor, ""] = usual
        self._largest, self._all_one = largest, all_one

    def holds(self, condition: Bool[Tensor, ""]) -> bool:
        """Return True; the device keeps whether it was so."""
        self.usual = self.usual & condition.detach().to(self.usual.device)
        return True

    def lower(self, norm: Float[Tensor, ""], others: Others) -> bool:
        """Return True, and keep whether gradient, loss and weights are finite."""
        for value in (norm, *others()):
            if value is not None:
                self.holds(torch.isfinite(value).all())
        return True

    def upper(self, norm: Float[Tensor, ""], loss: Float[Tensor, ""]) -> None:
        """Keep whether both are finite, and the norm is none that is too large."""
        self.holds(torch.isfinite(norm))
        self.holds(torch.isfinite(loss))
        if self._largest is not None:
            self.holds(norm.detach().to(self._largest) <= self._largest)

    def weights(self, all_one: Bool[Tensor, ""], any_dropped: Bool[Tensor, ""]) -> list[bool]:
        """Return what is usual: no example is dropped; the device keeps whether it was so."""
        self.holds(~any_dropped)
        return [self._all_one and self.holds(all_one), False]


@torch.no_grad()
def kept(usual: Bool[Tensor, ""], new: TreeT, old: TreeT) -> TreeT:
    """Return ``new`` if all was usual, else ``old``, leaf by leaf, without looking.

    Counts, which are int64 scalars in the memory of the host, are those of ``new``: whoever reads
    the guard puts them back (``counts`` and ``with_counts``).

    Args:
        usual: A scalar.
        new: The state after a step; its leaves are overwritten.
        old: The state before it, of the same structure. A leaf that was changed in place is the
            same tensor in both.
    """

    def choose(after: Tensor, before: Tensor) -> Tensor:
        if after is before or is_count(after):
            return after
        return torch.where(usual, after, before, out=after)

    return tree.map(choose, new, old)


def is_count(leaf: Tensor) -> bool:
    """Return whether a leaf of a state is a count that the host keeps."""
    return leaf.is_cpu and leaf.dtype == torch.int64 and leaf.dim() == 0


def counts(state: TreeT) -> list[Tensor]:
    """Return copies of the counts of a state, in the order of its leaves."""
    return [leaf.clone() for leaf in tree.leaves(state) if is_count(leaf)]


def with_counts(state: TreeT, numbers: list[Tensor]) -> TreeT:
    """Return a state with other counts, from ``counts``."""
    remaining = iter(numbers)
    return tree.map(lambda leaf: next(remaining) if is_count(leaf) else leaf, state)
