"""What is audited: functions of φ whose slope the hypergradient should be.

The upper loss after the steps that it went through (``AuditedSteps``), or after the lower level is
solved (``AuditedSolution``). Each has two of them: ``upper_after`` with the constants of autograd
(detached features, ``.detach()``, ``torch.no_grad``) held at their values at φ, which is what a
hypergradient claims, and ``upper_after_whole``, in which they move.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import tree
from bilevel.audit.lower_gradient import gradient_error, plain_gradient, ratio, slope_error
from bilevel.autodiff import random_state
from bilevel.autodiff.gradient import as_leaves, upper_gradient
from bilevel.autodiff.random_state import RandomState
from bilevel.autodiff.stop_gradients import Constant, StopGradients, equal, watched
from bilevel.hypergradients.base import (
    Hypergradient,
    HypergradientResult,
    exact_steps,
    lower_route,
    take_window,
)
from bilevel.hypergradients.one_step import OneStep, OneStepRecord
from bilevel.lower.lower_pass import lower_pass
from bilevel.lower.steps import Point, advance, take_steps
from bilevel.optimizers.base import clip_scale
from bilevel.problem import Batch, Params, Problem, upper_value
from bilevel.solver import BilevelSolver
from bilevel.state import BilevelState
from bilevel.tree import Tree

NOT_FINITE = (
    "a lower gradient is not finite at this state, so there is no hypergradient to look at; choose "
    "a state and batches at which the lower loss and its gradient are finite"
)


class _Start(NamedTuple):
    """From where a step is taken."""

    point: Point
    random: RandomState


class AuditedSteps:
    """A window with its hypergradient, and the same steps by plain autograd as functions of φ.

    Attributes:
        result: Of the hypergradient, without an average of v (``direction_decay``) or a
            v of an earlier step (``upper_gradient_every``).
        constants: What depends on θ and is a constant for autograd, in the order of the steps.
        exact: Whether it claims to be the slope of ``upper_after``.
        lower_gradient_error: Relative error of its last gradient against plain autograd's.
        lower_slope_error: The same against differences of the lower loss, by forward passes.
        notes: What should be known of the steps.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        solver: BilevelSolver[Any, Any, Any],
        state: BilevelState[Any, Any],
        batches: Sequence[Sequence[Batch]],
        upper_batch: Batch,
    ) -> None:
        self._problem = solver.problem
        self._upper_params, self._upper_batch = state.upper_params, upper_batch
        self._hypergradient: Hypergradient = solver.hypergradient
        memory = state.memory
        if isinstance(self._hypergradient, OneStep):
            self._hypergradient = dataclasses.replace(
                self._hypergradient, direction_decay=0.0, upper_gradient_every=1
            )
            memory = None
        self._window = window = solver.window_at(state, batches)
        batches = window.batches
        self._optimizer, start = window.optimizer, window.start
        random = random_state.capture(state.lower_params)
        with random_state.rewound_to(random, state.lower_params):
            record = self._hypergradient.record(window, upper_batch, memory)
            taken = take_steps(window, lower_route(self._hypergradient), record)
            if taken.skipped:
                raise ValueError(NOT_FINITE)
            # Of steps that are recorded otherwise there are only figures.
            own = record.passed.grads if isinstance(record, OneStepRecord) else None
            self.result: HypergradientResult = record.hypergradient(taken.end)
        claimed = exact_steps(self._hypergradient, len(batches))
        self.exact = claimed is not None
        constant = len(batches) - (len(batches) if claimed is None else claimed)
        starts = [_Start(start, random)]
        gradients = []
        for micro_batches in batches:
            grads, after = self._grads(starts[-1], state.upper_params, micro_batches)
            starts.append(_Start(advance(self._optimizer, starts[-1].point, grads), after))
            gradients.append(grads)
        self._batches, self._first = batches[constant:], starts[constant]
        self._last, self._end = starts[-2:]
        self._scales = [self._held_scale(grads) for grads in gradients[constant:]]
        params, random = self._last.point.lower_params, self._last.random
        grads = own
        if grads is None:
            grads = route_gradient(solver, params, state.upper_params, batches[-1], random)
        self.lower_gradient_error = gradient_error(grads, gradients[-1])
        self.lower_slope_error = slope_error(
            self._problem, params, state.upper_params, batches[-1], random, grads
        )
        self.constants = self.constants_at(state.upper_params)

    def upper_after(self, upper_params: Params) -> Tensor:
        """Return L_upper(θ(φ), φ), θ(φ) being reached by the steps that are differentiated.

        The clip scales are those of the steps that were taken, unless they are differentiated, and
        so are the constants. Where φ sets the optimizer's numbers or the first θ, it does so here;
        NaN where such a number is out of its range.
        """
        return self._upper_after(upper_params, StopGradients(self.constants))

    def upper_after_whole(self, upper_params: Params) -> Tensor:
        """Return the same with constants that move with φ."""
        return self._upper_after(upper_params, StopGradients())

    def constants_at(self, upper_params: Params) -> list[Constant]:
        """Return the constants at another φ."""
        watch = StopGradients()
        self._upper_after(upper_params, watch)
        return watch.constants

    def _upper_after(self, upper_params: Params, watch: StopGradients) -> Tensor:
        try:
            window = self._window.at(upper_params)
        except ValueError:  # numbers out of their range, at a φ that is only tried
            return torch.tensor(math.nan, dtype=torch.float64)
        start = self._first
        if window.initial is not None:  # then all of the steps are differentiated
            start = _Start(window.start, start.random)
        before = start
        for micro_batches, scale in zip(self._batches, self._scales, strict=True):
            before = start
            grads, after = self._grads(start, upper_params, micro_batches, watch)
            optimizer: Any = window.optimizer
            if scale is not None:
                grads = tree.scale(scale, grads)
                optimizer = dataclasses.replace(optimizer, max_norm=None)
            start = _Start(advance(optimizer, start.point, grads), after)
        return self._upper(_Start(start.point, before.random), upper_params, watch)

    def claimed_by_one_step(self) -> Callable[[Params], Tensor]:
        """Return φ -> ⟨μ, ∇_θ L_lower(θ, φ)⟩ + L_upper(·, φ), with μ as ``OneStep`` forms it.

        What it stands for by design where it is not exact: order upper-first, whose v and direct
        term are those at θ, and other conventions for the derivative of the update.
        """
        one_step = self._hypergradient
        assert isinstance(one_step, OneStep)
        params, state = self._last.point
        grads, at = None, self._last.point
        if one_step.order == "lower-first":
            grads, _ = self._grads(self._last, self._upper_params, self._batches[-1])
            at = self._end.point
        with random_state.rewound_to(self._last.random, params):
            v = upper_gradient(
                self._problem, at.lower_params, self._upper_params, self._upper_batch
            ).lower
        mu = one_step.update_derivative.pull_back(self._optimizer, grads, state, params, v)

        def claimed(upper_params: Params) -> Tensor:
            lower, _ = self._grads(self._last, upper_params, self._batches[-1])
            upper = self._upper(_Start(at, self._last.random), upper_params, StopGradients())
            return tree.vdot(lower, mu) + upper

        return claimed

    def _held_scale(self, grads: Tree) -> Tensor | None:
        """Return the clip scale of a step, None if there is none or it counts as a function."""
        max_norm = getattr(self._optimizer, "max_norm", None)
        if max_norm is None or getattr(self._optimizer, "differentiate_clip", False):
            return None
        return clip_scale(tree.norm(grads), max_norm)

    def _grads(
        self,
        start: _Start,
        upper_params: Params,
        batches: Sequence[Batch],
        watch: StopGradients | None = None,
    ) -> tuple[Tree, RandomState]:
        """The lower gradient, and where it left the random numbers."""
        params = start.point.lower_params
        problem = self._problem if watch is None else watched(self._problem, watch)
        with random_state.rewound_to(start.random, params):
            grads = plain_gradient(problem, params, upper_params, batches)
            return grads, random_state.capture(params)

    def _upper(self, start: _Start, upper_params: Params, watch: StopGradients) -> Tensor:
        params = start.point.lower_params
        with random_state.rewound_to(start.random, params):
            return upper_loss(self._problem, params, upper_params, self._upper_batch, watch)


class AuditedSolution:
    """The lower level solved on one batch, and solved again for any φ near by.

    From the state ``solve_steps`` plain lower steps are taken on the batches, always with the same
    random numbers, so that there is one lower loss to solve; the hypergradient is computed there,
    after one more. ``upper_after`` goes on from the same point with another φ, as many steps again.

    Attributes:
        result: Of the hypergradient at the solution, without what it keeps between windows.
        lower_gradient_error: Relative error of its gradient against plain autograd's.
        lower_slope_error: The same against differences of the lower loss, by forward passes.
        notes: How nearly the lower level was solved.
    """

    exact = True

    def __init__(
        self,
        solver: BilevelSolver[Any, Any, Any],
        state: BilevelState[Any, Any],
        batches: Sequence[Batch],
        upper_batch: Batch,
        solve_steps: int,
    ) -> None:
        self._problem = solver.problem
        self._window = window = solver.window_at(state, [batches])
        batches = window.batches[0]
        self._batches, self._upper_batch = batches, upper_batch
        self._steps = solve_steps
        self._random = random_state.capture(state.lower_params)
        middle = self._solved(window.start, state.upper_params, solve_steps // 2)
        at = self._solved(middle, state.upper_params, solve_steps - solve_steps // 2)
        moved = float(tree.norm(tree.axpy(-1.0, middle.lower_params, at.lower_params)))
        with random_state.rewound_to(self._random, at.lower_params):
            steps, result = take_window(
                dataclasses.replace(window, start=at, initial=None),
                solver.hypergradient,
                upper_batch,
                solver.hypergradient.init(window.optimizer, at.lower_params, state.upper_params),
            )
        if result is None:
            raise ValueError(NOT_FINITE)
        self.result: HypergradientResult = result
        stationarity = self.result.figures.get("stationarity")
        self.notes = (
            f"over the second half of {solve_steps} steps that solve the lower level θ moved by "
            f"{moved / (float(tree.norm(at.lower_params)) or 1.0):.1e} of its size"
            + ("" if stationarity is None else f"; stationarity {float(stationarity):.1e}"),
        )
        self._end = steps.end
        in_lower, in_upper = StopGradients(), StopGradients()
        self._gradient(self._end, state.upper_params, in_lower)
        self._upper(self._end, state.upper_params, in_upper)
        self._constants = in_lower.constants, in_upper.constants
        params, upper = at.lower_params, state.upper_params
        grads = route_gradient(solver, params, upper, batches, self._random)
        self.lower_gradient_error = gradient_error(grads, self._gradient(at, upper))
        self.lower_slope_error = slope_error(
            self._problem, params, upper, batches, self._random, grads
        )

    def upper_after(self, upper_params: Params) -> Tensor:
        """Return L_upper(θ*(φ), φ), the constants being those at the solution for the first φ."""
        lower, upper = self._constants
        end = self._solved(self._end, upper_params, self._steps, lower)
        return self._upper(end, upper_params, StopGradients(upper))

    def upper_after_whole(self, upper_params: Params) -> Tensor:
        """Return the same with constants that move with θ and φ."""
        end = self._solved(self._end, upper_params, self._steps)
        return self._upper(end, upper_params, StopGradients())

    @property
    def constants(self) -> list[Constant]:
        """What depends on θ and is a constant for autograd, at the solution for the first φ."""
        return [*self._constants[0], *self._constants[1]]

    def constants_at(self, upper_params: Params) -> list[Constant]:
        """Return the constants at the solution for another φ, after a tenth of the steps."""
        end = self._solved(self._end, upper_params, self._steps // 10 + 1)
        watch = StopGradients()
        self._gradient(end, upper_params, watch)
        self._upper(end, upper_params, watch)
        return watch.constants

    def _gradient(
        self, point: Point, upper_params: Params, watch: StopGradients | None = None
    ) -> Tree:
        problem = self._problem if watch is None else watched(self._problem, watch)
        with random_state.rewound_to(self._random, point.lower_params):
            return plain_gradient(problem, point.lower_params, upper_params, self._batches)

    def _upper(self, point: Point, upper_params: Params, watch: StopGradients) -> Tensor:
        params = point.lower_params
        with random_state.rewound_to(self._random, params):
            return upper_loss(self._problem, params, upper_params, self._upper_batch, watch)

    def _solved(
        self,
        point: Point,
        upper_params: Params,
        steps: int,
        held: Sequence[Constant] | None = None,
    ) -> Point:
        optimizer = self._window.at(upper_params).optimizer
        for _ in range(steps):
            watch = StopGradients(held) if held else None
            grads = self._gradient(point, upper_params, watch)
            point = advance(optimizer, point, grads)
        return point


def upper_loss(
    problem: Problem,
    lower_params: Params,
    upper_params: Params,
    batch: Batch,
    watch: StopGradients,
) -> Tensor:
    """Return the upper loss, without a graph, and show ``watch`` what depends on θ in it."""
    with torch.enable_grad():
        leaves = as_leaves(lower_params)
        loss, _ = upper_value(watched(problem, watch), leaves, upper_params, batch)
    return loss.detach()


def route_gradient(
    solver: BilevelSolver[Any, Any, Any],
    lower_params: Params,
    upper_params: Params,
    batches: Sequence[Batch],
    random: RandomState,
) -> Tree:
    """Return the lower gradient as the solver's steps compute it."""
    route = lower_route(solver.hypergradient)
    fixed = tree.map(Tensor.detach, upper_params)
    with random_state.rewound_to(random, lower_params):
        return lower_pass(solver.problem, route, lower_params, fixed, batches).grads


def slope_errors(
    function: Callable[[Params], Tensor],
    upper_params: Params,
    directions: Sequence[Tree],
    steps: Sequence[float],
    slopes: Sequence[float],
) -> tuple[dict[float, float], dict[float, float]]:
    """Return step -> relative error over all directions, and what rounding alone may make of it."""
    size = _entry_size(upper_params)
    errors, floors = {}, {}
    for step in steps:
        measured, values = [], []
        for direction in directions:
            ahead, behind = (
                function(tree.axpy(sign * step * size, direction, upper_params))
                for sign in (1.0, -1.0)
            )
            measured.append(float(ahead - behind) / (2.0 * step * size))
            values.append(abs(float(ahead)) * torch.finfo(ahead.dtype).eps / (step * size))
        gaps = [slope_seen - slope for slope_seen, slope in zip(measured, slopes, strict=True)]
        length = max(math.hypot(*slopes), math.hypot(*measured))
        errors[step] = ratio(math.hypot(*gaps), length)
        floors[step] = ratio(math.hypot(*values), length)
    return errors, floors


def constants_move(
    audit: AuditedSteps | AuditedSolution, upper_params: Params, direction: Tree, step: float
) -> bool:
    """Return whether constants of autograd are others after a relative step in φ."""
    if not audit.constants:
        return False
    shifted = tree.axpy(step * _entry_size(upper_params), direction, upper_params)
    return not equal(audit.constants, audit.constants_at(shifted))


def _entry_size(params: Params) -> float:
    """Return the root mean square of all entries, 1 if that is 0."""
    entries = sum(leaf.numel() for leaf in tree.leaves(params))
    return float(tree.norm(params)) / math.sqrt(max(entries, 1)) or 1.0
