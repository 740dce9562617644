"""What a hypergradient is: lower steps, and dL_upper/dφ through them.

`OneStep`, `Unrolled`, `Implicit` and `Penalty` implement `Hypergradient`; a solver takes any object
that does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from bilevel.lower.lower_pass import LowerPass
from bilevel.optimizers.base import DifferentiableOptimizer
from bilevel.problem import Batch, Params, Problem
from bilevel.tree import Tree


class HypergradientResult(NamedTuple):
    """A window of lower steps and, if asked for, the hypergradient through it.

    Attributes:
        lower_params: θ after the window.
        optimizer_state: After the window.
        passes: What each lower step found, in order; any may be a `LowerPass.summary`.
        upper_loss: None without an upper batch.
        hypergradient: dL_upper/dφ, None leaves where φ has no influence; None without upper batch.
        memory: What the method keeps for the next window, a pytree of tensors or None.
        figures: Further scalars for the log: residual, iterations, stationarity, ...
        notes: What a user should know about this window.
        upper_aux: What the upper loss returned beside its value, detached.
    """

    lower_params: Params
    optimizer_state: Any
    passes: tuple[LowerPass, ...]
    upper_loss: Tensor | None
    hypergradient: Tree | None
    memory: Any
    figures: Mapping[str, Tensor]
    notes: tuple[str, ...]
    upper_aux: Any = None


class Hypergradient(Protocol):
    """A way to compute dL_upper/dφ: a frozen dataclass of its hyperparameters, pure methods.

    Three things a class may add:

    - an attribute ``last_step_only = True``, if it only ever looks at the last lower step of a
      window: `BilevelSolver.step` can then take the window apart;
    - a method ``exact_steps(unroll_steps) -> int | None``: through how many of the window's last
      lower steps its derivative is exact, for `check_hypergradient` to hold it to that. Without
      it, or with None, it is taken for an approximation by design;
    - an attribute ``at_solution = True``, if its derivative is that of the solved lower level,
      for `check_hypergradient(..., solve_steps=...)` to hold it to that.
    """

    def check(
        self, problem: Problem, optimizer: DifferentiableOptimizer, unroll_steps: int
    ) -> None:
        """Raise ValueError, naming what to change, if the method does not apply."""

    def init(
        self, optimizer: DifferentiableOptimizer, lower_params: Params, upper_params: Params
    ) -> Any:
        """Return the memory before the first window, a pytree of tensors or None."""

    def window(
        self,
        problem: Problem,
        optimizer: DifferentiableOptimizer,
        lower_params: Params,
        upper_params: Params,
        optimizer_state: Any,
        batches: Sequence[Sequence[Batch]],
        upper_batch: Batch | None,
        memory: Any,
    ) -> HypergradientResult:
        """Take one lower step per entry of `batches` (its micro-batches).

        Without an upper batch this is plain training bit for bit, and the memory comes back as
        it was. With one the same lower steps are taken, with the same random numbers, and the
        torch generators are left where these steps leave them.
        """


def spans_window(hypergradient: Hypergradient, unroll_steps: int) -> bool:
    """Return whether an upper step needs the batches of several lower steps at once."""
    return unroll_steps > 1 and not getattr(hypergradient, "last_step_only", False)


def exact_steps(hypergradient: Hypergradient, unroll_steps: int) -> int | None:
    """Return through how many of the last lower steps the derivative is exact, if it is."""
    declared: Callable[[int], int | None] = getattr(hypergradient, "exact_steps", lambda _: None)
    return declared(unroll_steps)
