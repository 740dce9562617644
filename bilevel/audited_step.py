"""The step that is audited, and functions of φ that its hypergradient should be the slope of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from bilevel import random_state, tree
from bilevel.lower_pass import lower_pass
from bilevel.one_step import OneStep, OneStepResult, upper_gradient
from bilevel.optimizer import clip_scale
from bilevel.problem import Batch, Params, upper_value
from bilevel.routes import Jvp
from bilevel.solver import BilevelSolver, BilevelState
from bilevel.tree import Tree


class AuditedStep:
    """A step with its hypergradient, and the same step by plain autograd as a function of φ."""

    def __init__(
        self,
        solver: BilevelSolver,
        state: BilevelState,
        lower_batches: Sequence[Batch],
        upper_batch: Batch,
    ) -> None:
        self._solver, self._state = solver, state
        self._lower_batches, self._upper_batch = lower_batches, upper_batch
        self._random = random_state.capture(state.lower_params)
        assert isinstance(solver.hypergradient, OneStep)
        one_step = dataclasses.replace(solver.hypergradient, direction_decay=0.0)
        with self._replay():
            self.result: OneStepResult = one_step.step(
                solver.problem,
                solver.lower_optimizer,
                state.lower_params,
                state.upper_params,
                state.lower_optimizer,
                lower_batches,
                upper_batch,
            )
        grads = self._grads(state.upper_params)
        difference = tree.axpy(-1.0, self.result.passed.grads, grads)
        self.lower_gradient_error = ratio(float(tree.norm(difference)), float(tree.norm(grads)))
        optimizer: Any = solver.lower_optimizer
        self._optimizer = optimizer
        self._scale: Tensor | None = None
        max_norm = getattr(optimizer, "max_norm", None)
        if max_norm is not None and not getattr(optimizer, "differentiate_clip", False):
            self._scale = clip_scale(tree.norm(grads), max_norm)
            self._optimizer = dataclasses.replace(optimizer, max_norm=None)

    def upper_after_step(self, upper_params: Params) -> Tensor:
        """Return L_upper(θ'(φ), φ)."""
        grads = self._grads(upper_params)
        with torch.no_grad(), self._replay():
            if self._scale is not None:
                grads = tree.scale(self._scale, grads)
            state = self._state
            params, _ = self._optimizer.update(grads, state.lower_optimizer, state.lower_params)
            problem = self._solver.problem
            return upper_value(problem, params, upper_params, self._upper_batch)[0]

    def claimed_upper_first(self) -> Callable[[Params], Tensor]:
        """Return φ -> ⟨μ, ∇_θ L_lower(θ, φ)⟩ + L_upper(θ, φ), μ as that order forms it."""
        state, problem = self._state, self._solver.problem
        with self._replay():
            v = upper_gradient(
                problem, state.lower_params, state.upper_params, self._upper_batch
            ).lower
        mu = self._solver.lower_optimizer.predicted_grads_vjp(
            state.lower_optimizer, state.lower_params, v
        )

        def claimed(upper_params: Params) -> Tensor:
            product = tree.vdot(self._grads(upper_params), mu)
            with torch.no_grad(), self._replay():
                direct, _ = upper_value(
                    problem, state.lower_params, upper_params, self._upper_batch
                )
            return product + direct

        return claimed

    def _grads(self, upper_params: Params) -> Tree:
        """The lower gradient, by plain autograd whatever the route."""
        with self._replay():
            return lower_pass(
                self._solver.problem,
                Jvp(),
                self._state.lower_params,
                tree.map(Tensor.detach, upper_params),
                self._lower_batches,
            ).grads

    def _replay(self) -> AbstractContextManager[None]:
        return random_state.replay(self._random, self._state.lower_params)


def slope_errors(
    function: Callable[[Params], Tensor],
    upper_params: Params,
    directions: Sequence[Tree],
    steps: Sequence[float],
    slopes: Sequence[float],
) -> tuple[dict[float, float], dict[float, float]]:
    """Return step -> relative error over all directions, and what rounding alone may make of it."""
    entries = sum(leaf.numel() for leaf in tree.leaves(upper_params))
    size = float(tree.norm(upper_params)) / math.sqrt(max(entries, 1)) or 1.0
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
        gaps = [found - slope for found, slope in zip(measured, slopes, strict=True)]
        length = max(math.hypot(*slopes), math.hypot(*measured))
        errors[step] = ratio(math.hypot(*gaps), length)
        floors[step] = ratio(math.hypot(*values), length)
    return errors, floors


def ratio(part: float, whole: float) -> float:
    """Return part / whole, 0 for 0/0, and never a comparison-proof NaN."""
    if math.isnan(part) or math.isnan(whole):
        return math.inf
    return part / whole if whole > 0.0 else (0.0 if part == 0.0 else math.inf)
