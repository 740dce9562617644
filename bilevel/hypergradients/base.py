"""What a hypergradient is: a record of lower steps, and dL_upper/dφ through them.

``OneStep``, ``Unrolled``, ``Implicit`` and ``Penalty`` implement ``Hypergradient``; a solver takes
any object that does. None of them takes a lower step: ``bilevel.lower.steps`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

from jaxtyping import Float
from torch import Tensor

from bilevel.lower.steps import LowerSteps, Point, Recorder, Window, take_steps
from bilevel.optimizers.base import DifferentiableOptimizer
from bilevel.problem import Batch, Params, Problem
from bilevel.routes import Jvp, Route
from bilevel.tree import Tree


class HypergradientResult(NamedTuple):
    """The hypergradient of a window.

    Attributes:
        upper_loss: The upper loss where it was evaluated; None: it was not.
        hypergradient: dL_upper/dφ, None leaves where φ has no influence.
        memory: What the method keeps for the next window, a pytree of tensors or None.
        figures: Further scalars for the log: residual, iterations, stationarity, ...
        notes: What a user should know about this window.
        upper_aux: What the upper loss returned beside its value, detached.
    """

    upper_loss: Float[Tensor, ""] | None
    hypergradient: Tree
    memory: Any
    figures: Mapping[str, Float[Tensor, ""]] = {}  # never written to
    notes: tuple[str, ...] = ()
    upper_aux: Any = None


Taken: TypeAlias = tuple[LowerSteps, HypergradientResult]


class Record(Recorder, Protocol):
    """What a hypergradient remembers of a window, and makes of it."""

    def hypergradient(self, end: Point) -> HypergradientResult:
        """Return the hypergradient of the window, whose steps end at this point.

        Called once, after the last step. The torch generators must be left as they are.
        """


class Hypergradient(Protocol):
    """A way to compute dL_upper/dφ: a frozen dataclass of its hyperparameters, pure methods.

    What a class may add:

    - an attribute ``lower_route``: the route by which the lower passes are run, also in windows
      without an upper batch, so that these are the same steps bit for bit. Without it: ``Jvp()``,
      the backward pass of the weighted loss as autograd has it;
    - an attribute ``last_step_only = True``, if it only ever looks at the last lower step of a
      window: ``BilevelSolver.step`` can then take the window apart;
    - a method ``exact_steps(unroll_steps) -> int | None``: through how many of the window's last
      lower steps its derivative is exact, for ``check_hypergradient`` to hold it to that. Without
      it, or with None, it is taken for an approximation by design;
    - an attribute ``at_solution = True``, if its derivative is that of the solved lower level,
      for ``check_hypergradient(..., solve_steps=...)`` to hold it to that;
    - attributes ``through_hyperparameters = True`` and ``through_initial = True``, if its
      derivative includes what φ does through the numbers of the lower optimizer, and through θ
      before the window (``Window.pulled_back``). Without them a solver with such a φ refuses it;
    - a method ``at_once(window, upper_batch, memory) -> (steps, result) or None``: the window and
      its hypergradient in another way than by a record, with the same steps bit for bit. None:
      there is none for this window, and the torch generators are as they were;
    - a method ``reads_upper_batch(memory) -> bool``: whether the next upper step looks at its
      batch. Without it every one does;
    - an attribute ``over_ranks = True``, if it sums over the ranks what it computes of batches
      (``Window.collective``). Without it a solver with several ranks refuses it.
    """

    def check(
        self, problem: Problem, optimizer: DifferentiableOptimizer, unroll_steps: int
    ) -> None:
        """Raise ValueError, naming what to change, if the method does not apply."""

    def init(
        self, optimizer: DifferentiableOptimizer, lower_params: Params, upper_params: Params
    ) -> Any:
        """Return the memory before the first window, a pytree of tensors or None."""

    def record(self, window: Window, upper_batch: Batch, memory: Any) -> Record:
        """Return what will remember the lower steps of this window and differentiate them.

        Args:
            window: The window whose steps are about to be taken.
            upper_batch: The batch of the upper loss.
            memory: From ``init``, or of the last ``HypergradientResult``.
        """


def take_window(
    window: Window,
    hypergradient: Hypergradient,
    upper_batch: Batch | None = None,
    memory: Any = None,
) -> tuple[LowerSteps, HypergradientResult | None]:
    """Take the lower steps of a window and, given an upper batch, differentiate through them.

    Without an upper batch this is plain training bit for bit. With one the same lower steps are
    taken, with the same random numbers, and the torch generators are left where these leave them.
    Where a step was left out, because its gradient was not finite, there is no hypergradient.
    """
    route = lower_route(hypergradient)
    if upper_batch is None:
        return take_steps(window, route), None
    at_once: Callable[..., Taken | None] = getattr(hypergradient, "at_once", lambda *_: None)
    if (found := at_once(window, upper_batch, memory)) is not None:
        return found
    record = hypergradient.record(window, upper_batch, memory)
    steps = take_steps(window, route, record)
    return steps, None if steps.skipped else record.hypergradient(steps.end)


def lower_route(hypergradient: Hypergradient) -> Route:
    """Return the route by which the lower passes are run."""
    route: Route = getattr(hypergradient, "lower_route", Jvp())
    return route


def spans_window(hypergradient: Hypergradient, unroll_steps: int) -> bool:
    """Return whether an upper step needs the batches of several lower steps at once."""
    return unroll_steps > 1 and not getattr(hypergradient, "last_step_only", False)


def exact_steps(hypergradient: Hypergradient, unroll_steps: int) -> int | None:
    """Return through how many of the last lower steps the derivative is exact, if it is."""
    declared: Callable[[int], int | None] = getattr(hypergradient, "exact_steps", lambda _: None)
    return declared(unroll_steps)
