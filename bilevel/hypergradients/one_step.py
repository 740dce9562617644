"""The hypergradient through one lower step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from bilevel import tree
from bilevel.autodiff import random_state
from bilevel.autodiff.gradient import UpperGradient, as_leaves, upper_gradient
from bilevel.hypergradients.base import HypergradientResult
from bilevel.hypergradients.update_derivative import Exact, Sama, UpdateDerivative
from bilevel.lower.lower_pass import LowerPass, lower_pass
from bilevel.lower.mixed_product import mixed_product
from bilevel.optimizers.base import DifferentiableOptimizer, OptimizerState
from bilevel.problem import Batch, Params, Problem, ReweightingProblem
from bilevel.routes import Auto, Dot, Ghost, PerExample, Route
from bilevel.tree import Tree

Order = Literal["lower-first", "upper-first"]


class Direction(NamedTuple):
    """Exponential average of v and the number of upper gradients in it (int64 scalar)."""

    average: Tree
    updates: Tensor


class OneStepResult(NamedTuple):
    """A lower step and, if asked for, the hypergradient through it.

    Attributes:
        lower_params: θ'.
        optimizer_state: After the step.
        passed: Gradient and micro-batches of the lower pass.
        upper: The upper loss and its gradients; None without an upper batch. With order upper-first
            without v, whose memory was free for the lower pass.
        hypergradient: dL_upper/dφ, None leaves where φ has no influence; None without upper batch.
        direction: Updated average of v; None if there is none.
    """

    lower_params: Params
    optimizer_state: Any
    passed: LowerPass
    upper: UpperGradient | None
    hypergradient: Tree | None
    direction: Direction | None


@dataclass(frozen=True)
class OneStep:
    """Exact derivative of the upper loss through one lower step.

    With g = ∇_θ L_lower(θ, φ), averaged over all micro-batches, and the optimizer's update
    θ' = θ'(θ, g, state)::

        μ = (∂θ'/∂g)ᵀ v        dL_upper/dφ = ∂/∂φ ⟨∇_θ L_lower(θ, φ), μ⟩ + ∂L_upper/∂φ

    The clip scale of the update counts as a constant, unless the optimizer says
    `differentiate_clip`: with one example and an active clip the exact derivative is zero.

    Args:
        route: How the mixed product is computed: cost and memory, never the result.
        order: "lower-first": v = ∇_θ L_upper(θ', φ), exact for the step taken. With Adam from a
            cold state the exact hypergradient is almost zero (the first step is ± lr whatever the
            gradient's size). "upper-first": v = ∇_θ L_upper(θ, φ), known before the lower pass;
            μ is what the update's derivative is expected to be (`predicted_grads_vjp`): exact for
            SGD without an active clip, for Adam with the second moment as it stands. v then is one
            step old, an error of the order of the learning rate.
        direction_decay: ρ of v̄ ← ρ v̄ + (1 − ρ) v, whose bias-corrected value takes the place of
            v: less noise from small upper batches, and v from slightly older θ. 0: off.
        update_derivative: What μ is made of: `Exact`, or a convention of the literature.

    Cost per iteration, F being a forward pass: 3F lower, 3F upper, and what the route adds.
    Source: Ren et al. 2018 (arXiv 1803.09050) and Shu et al. 2019 (arXiv 1902.07379) for SGD; the
    factor ∂θ'/∂g is what Betty's darts (arXiv 2207.02849) replaces by the identity and its sama
    (arXiv 2310.05674) by a diagonal without bias correction: see
    `bilevel.hypergradients.update_derivative`.

    Raises:
        ValueError: direction_decay outside [0, 1), or `Ghost` with lower-first.
    """

    route: Route = Auto()
    order: Order = "lower-first"
    direction_decay: float = 0.0
    update_derivative: UpdateDerivative = Exact()

    last_step_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.direction_decay < 1.0:
            raise ValueError(
                f"OneStep: direction_decay must lie in [0, 1), got {self.direction_decay!r}"
            )
        if self.order not in ("lower-first", "upper-first"):
            raise ValueError(
                f"OneStep: order must be 'lower-first' or 'upper-first', got {self.order!r}"
            )
        if isinstance(self.route, Ghost) and self.order == "lower-first":
            raise ValueError(
                "OneStep: Ghost() needs the upper gradient before the lower backward pass; choose "
                "order='upper-first', or PerExample() for lower-first"
            )
        if isinstance(self.update_derivative, Sama) and self.order == "upper-first":
            raise ValueError(
                "OneStep: Sama() looks at the gradient of the lower step, which order "
                "'upper-first' does not know yet; choose order='lower-first', or Exact()"
            )

    def check(
        self, problem: Problem, optimizer: DifferentiableOptimizer, unroll_steps: int
    ) -> None:
        """Raise ValueError if the route does not apply to the problem, or μ to the optimizer."""
        self.update_derivative.check(optimizer)
        if not isinstance(self.route, Dot | Ghost | PerExample):
            return
        name = type(self.route).__name__
        if not isinstance(problem, ReweightingProblem):
            raise ValueError(
                f"OneStep: {name}() needs a ReweightingProblem, whose losses are per example; "
                f"found a {type(problem).__name__}: choose Jvp()"
            )
        if not problem.detach_features:
            raise ValueError(
                f"OneStep: {name}() cannot see weights that depend on θ (detach_features=False); "
                "choose Jvp()"
            )

    def exact_steps(self, unroll_steps: int) -> int | None:
        """Return 1 if this is the exact derivative through the last lower step, else None."""
        exact = self.order == "lower-first" and isinstance(self.update_derivative, Exact)
        return 1 if exact else None

    def init(
        self, optimizer: DifferentiableOptimizer, lower_params: Params, upper_params: Params
    ) -> Direction | None:
        """Return the average of v before the first upper gradient, None if there is none."""
        if self.direction_decay == 0.0:
            return None
        # In float32 at least: in bfloat16 0.999 of a number rounds to that number.
        average = tree.map(
            lambda leaf: torch.zeros_like(leaf, dtype=tree.wide_dtype(leaf.dtype)), lower_params
        )
        return Direction(average, torch.zeros((), dtype=torch.int64))

    def window(
        self,
        problem: Problem,
        optimizer: DifferentiableOptimizer,
        lower_params: Params,
        upper_params: Params,
        optimizer_state: Any,
        batches: Sequence[Sequence[Batch]],
        upper_batch: Batch | None = None,
        memory: Direction | None = None,
    ) -> HypergradientResult:
        """Take the steps of a window and, given an upper batch, differentiate through the last."""
        passes: list[LowerPass] = []
        for plain in batches[:-1]:
            taken = self.step(
                problem, optimizer, lower_params, upper_params, optimizer_state, plain
            )
            lower_params, optimizer_state = taken.lower_params, taken.optimizer_state
            passes.append(taken.passed.summary())
        last = self.step(
            problem,
            optimizer,
            lower_params,
            upper_params,
            optimizer_state,
            batches[-1],
            upper_batch,
            memory,
        )
        return HypergradientResult(
            lower_params=last.lower_params,
            optimizer_state=last.optimizer_state,
            passes=(*passes, last.passed),
            upper_loss=None if last.upper is None else last.upper.loss,
            hypergradient=last.hypergradient,
            memory=last.direction,
            figures={},
            notes=() if last.upper is None else self.notes(last.passed, optimizer_state),
            upper_aux=None if last.upper is None else last.upper.aux,
        )

    def step(
        self,
        problem: Problem,
        optimizer: DifferentiableOptimizer,
        lower_params: Params,
        upper_params: Params,
        optimizer_state: Any,
        lower_batches: Sequence[Batch],
        upper_batch: Batch | None = None,
        direction: Direction | None = None,
    ) -> OneStepResult:
        """Take a lower step and, given an upper batch, differentiate through it.

        Every pass starts from (the upper one), or replays, the random state that the step found;
        the lower pass alone moves it on, so a step without an upper batch draws the same numbers.
        """
        differentiate = upper_batch is not None
        start = random_state.capture(lower_params)
        upper: UpperGradient | None = None
        along: Tree | None = None
        if differentiate and self.order == "upper-first":
            with random_state.replay(start, lower_params):
                upper = upper_gradient(problem, lower_params, upper_params, upper_batch)
            along, direction = self._average(upper.lower, direction)
            along = self.update_derivative.pull_back(
                optimizer, None, optimizer_state, lower_params, along
            )
            upper = upper._replace(lower=None)
        leaves = as_leaves(upper_params) if differentiate else tree.map(Tensor.detach, upper_params)
        passed = lower_pass(
            problem,
            self.route,
            lower_params,
            leaves,
            lower_batches,
            differentiate=differentiate,
            direction=along,
        )
        with torch.no_grad():
            new_params, new_state = optimizer.update(passed.grads, optimizer_state, lower_params)
        if not differentiate:
            return OneStepResult(new_params, new_state, passed, None, None, direction)
        if upper is None:
            with random_state.replay(start, lower_params):
                upper = upper_gradient(problem, new_params, upper_params, upper_batch)
            along, direction = self._average(upper.lower, direction)
            along = self.update_derivative.pull_back(
                optimizer, passed.grads, optimizer_state, lower_params, along
            )
        product = mixed_product(problem, self.route, passed, lower_params, leaves, along)
        with torch.no_grad():
            hypergradient = tree.add(product, upper.direct)
        return OneStepResult(new_params, new_state, passed, upper, hypergradient, direction)

    def notes(self, passed: LowerPass, optimizer_state: Any) -> tuple[str, ...]:
        """Return what a user should know about a differentiated step."""
        notes = [micro.note for micro in passed.micro_batches if micro.note is not None]
        found = list(dict.fromkeys(f"Auto() took Jvp(): {note}" for note in notes))
        cold = (
            isinstance(optimizer_state, OptimizerState)
            and optimizer_state.second_moment is not None
            and not optimizer_state.steps
        )
        if cold and self.order == "lower-first":
            found.append(
                "the adaptive lower optimizer was cold: its first step hardly depends on the "
                "gradient's size, so the exact hypergradient is almost zero; set upper_start"
            )
        return tuple(found)

    @torch.no_grad()
    def _average(self, lower: Tree, direction: Direction | None) -> tuple[Tree, Direction | None]:
        """Return the direction to use for v, and the updated average."""
        if direction is None or self.direction_decay == 0.0:
            return lower, direction
        rho = self.direction_decay
        kept = tree.scale(rho, direction.average)
        wide = tree.map(lambda leaf: leaf.to(tree.wide_dtype(leaf.dtype)), lower)
        average = tree.axpy(1.0 - rho, wide, kept)
        updates = direction.updates + 1
        correction = 1.0 - rho ** int(updates)
        corrected = tree.map(lambda leaf, v: (leaf / correction).to(v.dtype), average, lower)
        return corrected, Direction(average, updates)
