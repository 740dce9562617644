"""The solved lower level as a function of φ; its slope is what `Implicit` computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bilevel import tree
from bilevel.audit.steps import gradient_error, plain_gradient
from bilevel.autodiff import random_state
from bilevel.hypergradients.base import HypergradientResult, take_window
from bilevel.lower.steps import Point, Window, advance
from bilevel.problem import Batch, Params, upper_value
from bilevel.solver import BilevelSolver
from bilevel.state import BilevelState
from bilevel.tree import Tree


class AuditedSolution:
    """The lower level solved on one batch, and solved again for any φ near by.

    From the state `solve_steps` plain lower steps are taken on the batches, always with the same
    random numbers, so that there is one lower loss to solve; the hypergradient is computed there,
    after one more. `upper_after` goes on from the same point with another φ, as many steps again.

    Attributes:
        result: Of the hypergradient at the solution, without what it keeps between windows.
        lower_gradient_error: Relative error of its gradient against plain autograd's.
        notes: How nearly the lower level was solved.
    """

    exact = True

    def __init__(
        self,
        solver: BilevelSolver,
        state: BilevelState,
        batches: Sequence[Batch],
        upper_batch: Batch,
        solve_steps: int,
    ) -> None:
        self._problem, self._optimizer = solver.problem, solver.lower_optimizer
        self._batches, self._upper_batch = batches, upper_batch
        self._steps = solve_steps
        self._random = random_state.capture(state.lower_params)
        start = Point(state.lower_params, state.lower_optimizer)
        middle = self._solved(start, state.upper_params, solve_steps // 2)
        at = self._solved(middle, state.upper_params, solve_steps - solve_steps // 2)
        moved = float(tree.norm(tree.axpy(-1.0, middle.lower_params, at.lower_params)))
        with random_state.replay(self._random, at.lower_params):
            steps, result = take_window(
                Window(solver.problem, solver.lower_optimizer, at, state.upper_params, [batches]),
                solver.hypergradient,
                upper_batch,
                solver.hypergradient.init(
                    solver.lower_optimizer, at.lower_params, state.upper_params
                ),
            )
        assert result is not None
        self.result: HypergradientResult = result
        stationarity = self.result.figures.get("stationarity")
        self.notes = (
            f"over the second half of {solve_steps} steps that solve the lower level θ moved by "
            f"{moved / (float(tree.norm(at.lower_params)) or 1.0):.1e} of its size"
            + ("" if stationarity is None else f"; stationarity {float(stationarity):.1e}"),
        )
        self._end = steps.end
        plain = self._gradient(at, state.upper_params)
        self.lower_gradient_error = gradient_error(steps.passes[-1], plain)

    def upper_after(self, upper_params: Params) -> Tensor:
        """Return L_upper(θ*(φ), φ)."""
        params = self._solved(self._end, upper_params, self._steps).lower_params
        with torch.no_grad(), random_state.replay(self._random, params):
            return upper_value(self._problem, params, upper_params, self._upper_batch)[0]

    def _gradient(self, point: Point, upper_params: Params) -> Tree:
        with random_state.replay(self._random, point.lower_params):
            return plain_gradient(self._problem, point.lower_params, upper_params, self._batches)

    def _solved(self, point: Point, upper_params: Params, steps: int) -> Point:
        for _ in range(steps):
            point = advance(self._optimizer, point, self._gradient(point, upper_params))
        return point
