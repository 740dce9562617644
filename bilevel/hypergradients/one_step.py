"""The hypergradient through one lower step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import optree
import torch
from jaxtyping import Int64
from torch import Tensor

from bilevel import tree
from bilevel.autodiff import random_state
from bilevel.autodiff.gradient import UpperGradient, as_leaves, upper_gradient
from bilevel.autodiff.random_state import RandomState
from bilevel.hypergradients.base import HypergradientResult, Taken
from bilevel.hypergradients.one_graph import through_one_graph
from bilevel.hypergradients.update_derivative import Exact, Sama, UpdateDerivative
from bilevel.lower.kept_graph import is_small
from bilevel.lower.lower_pass import LowerPass
from bilevel.lower.mixed_product import mixed_product
from bilevel.lower.steps import PassRequest, Point, Step, Window
from bilevel.optimizers.base import DifferentiableOptimizer, Hyperparameters, OptimizerState
from bilevel.problem import Batch, Params, Problem, ReweightingProblem, is_separable
from bilevel.routes import Auto, Route
from bilevel.tree import Tree

Order = Literal["lower-first", "upper-first"]


class DirectionAverage(NamedTuple):
    """Exponential average of v and the number of upper gradients in it."""

    average: Tree
    updates: Int64[Tensor, ""]


class HeldDirection(NamedTuple):
    """A v that serves several upper steps (``upper_gradient_every``).

    Attributes:
        held: The average of v, without ``direction_decay`` the last v alone.
        uses: The upper steps that it has served; 0 before the first v.
    """

    held: DirectionAverage
    uses: Int64[Tensor, ""]


DirectionMemory: TypeAlias = DirectionAverage | HeldDirection | None
"""What ``OneStep`` keeps of v from upper step to upper step."""


@dataclass(frozen=True)
class OneStep:
    """Exact derivative of the upper loss through one lower step.

    With g = ∇_θ L_lower(θ, φ), averaged over all micro-batches, and the optimizer's update
    θ' = θ'(θ, g, state)::

        μ = (∂θ'/∂g)ᵀ v        dL_upper/dφ = ∂/∂φ ⟨∇_θ L_lower(θ, φ), μ⟩ + ∂L_upper/∂φ

    The clip scale of the update counts as a constant, unless the optimizer says
    ``differentiate_clip``: with one example and an active clip the exact derivative is zero.

    Args:
        route: How the mixed product is computed: cost and memory, never the result.
        order: "lower-first": v = ∇_θ L_upper(θ', φ), exact for the step taken. With Adam from a
            cold state the exact hypergradient is almost zero (the first step is ± lr whatever the
            gradient's size). "upper-first": v = ∇_θ L_upper(θ, φ), known before the lower pass;
            μ is what the update's derivative is expected to be (``predicted_grads_vjp``): exact for
            SGD without an active clip, for Adam with the second moment as it stands. v then is one
            step old, an error of the order of the learning rate; and the second moment of a young
            Adam moves a lot in a step: 31 % from the exact hypergradient was seen at step 4 of
            AdamW, 5 % at step 20, 1 % at step 100. Set ``upper_start`` accordingly.
        direction_decay: ρ of v̄ ← ρ v̄ + (1 − ρ) v, whose bias-corrected value takes the place of
            v: less noise from small upper batches, and v from slightly older θ. 0: off.
        update_derivative: What μ is made of: ``Exact``, or a convention of the literature.
        upper_gradient_every: N: upper step k = 0, 1, … takes v from the last of every N, with the
            lower gradients and the optimizer's state of its own step::

                v_k = ∇_θ L_upper(θ_j, φ_j),  j = N ⌊k / N⌋

            (or its average, in which there is one v per N steps). An approximation, exact for N = 1
            and for an upper loss linear in θ that is the same in all batches. In between neither
            the upper loss nor its batch is looked at. A skipped upper step does not count.

    Cost per iteration, F being a forward pass: 3F lower, 3F / N upper, and what the route adds. N
    above 1 keeps one copy of θ, as ``direction_decay`` does; both together keep no more.
    Source: Ren et al. 2018 (arXiv 1803.09050) and Shu et al. 2019 (arXiv 1902.07379) for SGD; the
    factor ∂θ'/∂g is what Betty's darts (arXiv 2207.02849) replaces by the identity and its sama
    (arXiv 2310.05674) by a diagonal without bias correction: see
    ``bilevel.hypergradients.update_derivative``.

    Raises:
        ValueError: direction_decay outside [0, 1), upper_gradient_every below 1, or ``Ghost`` or
            upper_gradient_every above 1 with lower-first; when v is computed: an
            upper_gradient_every above 1, and an upper loss that depends on φ other than by θ.
    """

    route: Route = Auto()
    order: Order = "lower-first"
    direction_decay: float = 0.0
    update_derivative: UpdateDerivative = Exact()
    upper_gradient_every: int = 1

    last_step_only: ClassVar[bool] = True
    over_ranks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.route, type) or not hasattr(self.route, "backward_pass"):
            raise TypeError(
                "OneStep: route must be Auto(), Jvp(), Reverse(), PerExample(), Ghost(), Dot() or "
                f"CentralDifference(), got {self.route!r}"
            )
        if not 0.0 <= self.direction_decay < 1.0:
            raise ValueError(
                f"OneStep: direction_decay must lie in [0, 1), got {self.direction_decay!r}"
            )
        if self.order not in ("lower-first", "upper-first"):
            raise ValueError(
                f"OneStep: order must be 'lower-first' or 'upper-first', got {self.order!r}"
            )
        if self.upper_gradient_every < 1:
            raise ValueError(
                "OneStep: upper_gradient_every must be at least 1, got "
                f"{self.upper_gradient_every!r}"
            )
        if self.upper_gradient_every > 1 and self.order == "lower-first":
            raise ValueError(
                f"OneStep: upper_gradient_every={self.upper_gradient_every} uses an upper gradient "
                "from before the lower step, and order 'lower-first' that after it; choose "
                "order='upper-first', or upper_gradient_every=1"
            )
        if self.route.needs_direction and self.order == "lower-first":
            raise ValueError(
                f"OneStep: {type(self.route).__name__}() needs the upper gradient before the "
                "lower backward pass; choose order='upper-first', or PerExample() for lower-first"
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
        if not self.route.per_example:
            return
        name = type(self.route).__name__
        if not isinstance(problem, ReweightingProblem):
            raise ValueError(
                f"OneStep: {name}() needs a ReweightingProblem, whose losses are per example; "
                f"found a {type(problem).__name__}: choose Auto()"
            )
        if not problem.detach_features:
            raise ValueError(
                f"OneStep: {name}() cannot see weights that depend on θ (detach_features=False); "
                "choose Auto()"
            )

    def exact_steps(self, unroll_steps: int) -> int | None:
        """Return 1 if this is the exact derivative through the last lower step, else None."""
        exact = self.order == "lower-first" and isinstance(self.update_derivative, Exact)
        return 1 if exact else None

    @property
    def through_hyperparameters(self) -> bool:
        """Whether the derivative includes what φ does through the optimizer's numbers."""
        return self.exact_steps(1) == 1

    def init(
        self, optimizer: DifferentiableOptimizer, lower_params: Params, upper_params: Params
    ) -> DirectionMemory:
        """Return what is kept of v before the first upper gradient, None if nothing is."""
        averages, holds = self.direction_decay > 0.0, self.upper_gradient_every > 1
        if not averages and not holds:
            return None

        def zeros(leaf: Tensor) -> Tensor:
            # In float32 at least: in bfloat16 0.999 of a number rounds to that number.
            dtype = tree.wide_dtype(leaf.dtype) if averages else leaf.dtype
            return torch.zeros_like(leaf, dtype=dtype)

        none = torch.zeros((), dtype=torch.int64)
        average = DirectionAverage(tree.map(zeros, lower_params), none)
        return HeldDirection(average, none.clone()) if holds else average

    @property
    def lower_route(self) -> Route:
        """The route by which the lower passes are run, with or without an upper step after them."""
        return self.route

    def record(self, window: Window, upper_batch: Batch, memory: DirectionMemory) -> OneStepRecord:
        """Return what will differentiate through the last step of this window."""
        return OneStepRecord(self, window, upper_batch, memory)

    def at_once(self, window: Window, upper_batch: Batch, memory: DirectionMemory) -> Taken | None:
        """Return the window and its hypergradient by one graph, if it is small and all goes well.

        Not in order upper-first, with an average or another derivative of the update, nor where
        there are rules per example, or a route was chosen.
        """
        exact = self.exact_steps(1) == 1 and memory is None
        if not exact or self.route != Auto() or is_separable(window.problem):
            return None
        found = through_one_graph(window, upper_batch, self.lower_route, 1)
        if found is None or len(window.batches) > 1:
            return found
        taken, result = found
        notes = *step_notes(self.order, window, window.start.optimizer_state), *result.notes
        return taken, result._replace(notes=notes)

    def reads_upper_batch(self, memory: DirectionMemory) -> bool:
        """Return whether the next upper step computes v, for which it looks at its batch."""
        if not isinstance(memory, HeldDirection):
            return True
        return not 0 < int(memory.uses) < self.upper_gradient_every

    @torch.no_grad()
    def renewed(self, v: Tree, memory: DirectionMemory) -> tuple[Tree, DirectionMemory]:
        """Return what takes the place of a new v, and the memory with v in it."""
        if not isinstance(memory, HeldDirection):
            return self.averaged(v, memory)
        direction, average = self.averaged(v, memory.held)
        assert average is not None
        if self.direction_decay == 0.0:
            kept = optree.tree_map(_or_zeros, average.average, v, none_is_leaf=True)
            average = DirectionAverage(kept, average.updates + 1)
        return direction, HeldDirection(average, torch.ones_like(memory.uses))

    @torch.no_grad()
    def held(self, memory: HeldDirection, params: Params) -> tuple[Tree, HeldDirection]:
        """Return what takes the place of v, in new memory and the dtypes of θ, and the memory."""
        correction = 1.0 - self.direction_decay ** int(memory.held.updates)
        direction = tree.map(
            lambda leaf, param: (leaf / correction).to(param.dtype), memory.held.average, params
        )
        return direction, memory._replace(uses=memory.uses + 1)

    def check_direct(self, direct: Tree) -> None:
        """Refuse the gradient of the upper loss in φ itself where v is to serve several steps.

        Raises:
            ValueError: There is such a gradient, and upper_gradient_every is above 1.
        """
        if self.upper_gradient_every > 1 and tree.leaves(direct):
            raise ValueError(
                f"OneStep: upper_gradient_every={self.upper_gradient_every} needs an upper loss "
                "that depends on the upper parameters through the lower ones alone, and this one "
                "has a gradient of their own; choose upper_gradient_every=1, or leave that term to "
                "the upper optimizer (weight_decay)"
            )

    @torch.no_grad()
    def averaged(
        self, v: Tree, average: DirectionAverage | None
    ) -> tuple[Tree, DirectionAverage | None]:
        """Return what takes the place of v, and the average with v in it."""
        if average is None or self.direction_decay == 0.0:
            return v, average
        rho = self.direction_decay
        kept = tree.scale(rho, average.average)
        wide = tree.map(lambda leaf: leaf.to(tree.wide_dtype(leaf.dtype)), v)
        mean = tree.axpy(1.0 - rho, wide, kept)
        updates = average.updates + 1
        correction = 1.0 - rho ** int(updates)
        corrected = tree.map(lambda leaf, v: (leaf / correction).to(v.dtype), mean, v)
        return corrected, DirectionAverage(mean, updates)


def _or_zeros(kept: Tensor | None, v: Tensor | None) -> Tensor | None:
    return torch.zeros_like(kept) if v is None and kept is not None else v


class OneStepRecord:
    """The last lower step of a window, and the hypergradient through it.

    The upper pass, and every pass that the product takes, draws the same random numbers as the
    lower pass of the step.

    Attributes:
        passed: Gradient and micro-batches of the last lower pass; in order lower-first without the
            gradient once μ is known.
        upper: The upper loss and its gradient in φ; v is freed once μ is known. None where an
            earlier v serves this step.
    """

    passed: LowerPass
    upper: UpperGradient | None

    def __init__(
        self,
        method: OneStep,
        window: Window,
        upper_batch: Batch,
        memory: DirectionMemory,
    ) -> None:
        self._method, self._window, self._upper_batch = method, window, upper_batch
        self._memory = memory
        self._leaves = as_leaves(window.upper_params)

    def before(self, number: int, point: Point, random: RandomState) -> PassRequest:
        """Ask for the last pass to be differentiable; upper-first: along a μ known by now."""
        if number < len(self._window.batches) - 1:
            return PassRequest()
        direction = None
        if self._method.order == "upper-first":
            direction = self._pulled_back(point, random, point.lower_params, None)
        keeps = keeps_graph(self._method, self._window, point.lower_params)
        return PassRequest(self._leaves, differentiate=True, direction=direction, keep_graph=keeps)

    def after(self, step: Step) -> None:
        """Keep the last step."""
        if step.number == len(self._window.batches) - 1:
            self._before, self._random, self.passed = step.before, step.random, step.passed

    def hypergradient(self, end: Point) -> HypergradientResult:
        """Return the hypergradient through the last step."""
        params, state = self._before
        direction = self.passed.direction
        if self._method.order == "lower-first":
            direction = self._pulled_back(
                self._before, self._random, end.lower_params, self.passed.grads
            )
            if self._window.hyperparameters is None:
                self.passed = replace(self.passed, grads=None)  # The product does not need it.
        product = mixed_product(
            self._window.problem,
            self._method.route,
            self.passed,
            params,
            self._leaves,
            direction,
        )
        upper = self.upper
        with torch.no_grad():
            hypergradient = product if upper is None else tree.add(product, upper.direct)
        if self._window.hyperparameters is not None:
            hypergradient = tree.add(hypergradient, self._window.pulled_back(None, self._numbers()))
        return HypergradientResult(
            upper_loss=None if upper is None else upper.loss,
            hypergradient=hypergradient,
            memory=self._memory,
            notes=(
                *self.passed.notes,
                *step_notes(self._method.order, self._window, state),
                *(() if upper is None else upper.notes),
            ),
            upper_aux=None if upper is None else upper.aux,
        )

    def _pulled_back(
        self, before: Point, random: RandomState, at: Params, grads: Tree | None
    ) -> Tree:
        """Return μ: v at the parameters ``at``, averaged, pulled back through the update."""
        window, method = self._window, self._method
        if isinstance(self._memory, HeldDirection) and not method.reads_upper_batch(self._memory):
            self.upper = None
            v, self._memory = method.held(self._memory, before.lower_params)
        else:
            with random_state.rewound_to(random, before.lower_params):
                self.upper = upper_gradient(
                    window.problem, at, window.upper_params, self._upper_batch, window.collective
                )
            method.check_direct(self.upper.direct)
            v, self._memory = method.renewed(self.upper.lower, self._memory)
            self.upper = self.upper._replace(lower=None)
        self._v = v if window.hyperparameters is not None else None
        return method.update_derivative.pull_back(
            window.optimizer, grads, before.optimizer_state, before.lower_params, v
        )

    def _numbers(self) -> Hyperparameters:
        """Return the cotangents of the optimizer's numbers that come from φ."""
        optimizer: Any = self._window.optimizer
        params, state = self._before
        found: Hyperparameters = optimizer.hyperparameters_vjp(
            self._window.numbers(), self.passed.grads, state, params, self._v
        )
        return found


def keeps_graph(method: OneStep, window: Window, params: Params) -> bool:
    """Return whether the last lower pass keeps its graph for the product: see ``PassRequest``.

    The rules per example need no other pass, and so no graph.
    """
    keeps = not is_separable(window.problem) and method.route == Auto()
    return keeps and is_small(params, window.batches[-1:])


def step_notes(order: Order, window: Window, optimizer_state: Any) -> tuple[str, ...]:
    """Return what a user should know about a step taken from this optimizer state.

    What φ does through the optimizer's numbers is not near zero from a cold state.
    """
    cold = (
        isinstance(optimizer_state, OptimizerState)
        and not optimizer_state.steps
        and getattr(window.optimizer, "is_blind_when_cold", False)
        and window.hyperparameters is None
    )
    return (_COLD,) if cold and order == "lower-first" else ()


_COLD = (
    "the adaptive lower optimizer was cold: its first step hardly depends on the gradient's size, "
    "so the exact hypergradient is almost zero; set upper_start"
)
