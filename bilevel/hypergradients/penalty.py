"""The hypergradient of a penalised problem, from first derivatives alone."""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from bilevel import tree
from bilevel.autodiff import random_state
from bilevel.autodiff.gradient import as_leaves, gradients, upper_gradient
from bilevel.autodiff.random_state import RandomState
from bilevel.checks import require
from bilevel.hypergradients.base import HypergradientResult
from bilevel.lower.lower_pass import LowerPass
from bilevel.lower.micro_batch import MicroBatch
from bilevel.lower.steps import PassRequest, Point, Step, Window
from bilevel.optimizers.base import DifferentiableOptimizer, Optimizer
from bilevel.optimizers.schedule import Schedule
from bilevel.problem import (
    Batch,
    Params,
    Problem,
    detached,
    is_separable,
    lower_value,
    upper_value,
    weighted_mean,
)
from bilevel.tree import Tree


class PenaltyMemory(NamedTuple):
    """What ``Penalty`` keeps between windows.

    Attributes:
        params: y, the second copy of θ.
        optimizer_state: Of the optimizer that moves it.
        updates: Hypergradients computed so far; what a schedule of λ sees.
    """

    params: Params
    optimizer_state: Any
    updates: Int64[Tensor, ""]


class _Step(NamedTuple):
    """A lower step as the copy meets it again."""

    start: RandomState
    passed: LowerPass  # without gradients


@dataclass(frozen=True)
class Penalty:
    """The hypergradient of the value-function penalty, without second derivatives.

    The condition that θ solves the lower problem is replaced by a penalty on a second copy y::

        F_λ(φ) = min_y L_upper(y, φ) + λ (L_lower(y, φ) − min_θ L_lower(θ, φ))
        dF_λ/dφ = ∂φ L_upper(y, φ) + λ (∂φ L_lower(y, φ) − ∂φ L_lower(θ, φ))

    at the two minima (Danskin). θ is what the lower steps make of it; y starts where it was left
    and takes ``steps`` steps of its own after them, on the same batches. Where the lower problem is
    strongly convex the bias against the implicit hypergradient is O(1/λ), y − θ as well, and the
    lower loss of y exceeds that of θ by O(1/λ²). A θ that is δ away from the minimum costs λ O(δ):
    the larger λ, the better θ must be solved.

    Both gradients of the difference, and all steps of y, see the same examples and the same random
    numbers as the lower steps: the difference is of order 1/λ, and independent samples would bury
    it in λ times their noise. The average in it is over all batches of the window. With detached
    features the weights are those that θ's features give, at y too: there the features are data.

    Args:
        strength: λ, or a function of the hypergradients computed so far. It must exceed a multiple
            of L_upper's curvature over that of L_lower; F2SA lets it grow as k^(1/7) to k^(1/3).
        steps: K, steps of y per window, with the batches of the last K lower steps (over again if
            there are fewer). None: as many as lower steps.
        optimizer: Moves y. None: as the lower optimizer, with a state of its own. The gradient is
            that of ``(L_upper + λ L_lower) / (1 + λ)``, so that a learning rate that is right for
            θ is right for y, whatever λ. Weight decay counts as part of the lower loss: a field
            ``weight_decay`` is multiplied by λ / (1 + λ) for y.

    ``StepInfo.figures`` has ``strength`` λ, ``distance`` ‖y − θ‖, ``gap`` L_lower(y, φ) −
    L_lower(θ, φ), and ``copy_upper_loss`` L_upper(y, φ): lower than that of θ, for y has been
    trained on it.

    Cost per window besides the lower steps: K (3F + 3F upper), 2F for each lower batch, 2F upper;
    F is a forward pass. Memory: y and its optimizer's state.

    Source: F2SA (Kwon et al. 2023, arXiv 2301.10945), whose steps of y have the size lr / λ and
    whose batches are independent of each other. The solver of that name in benchmark_bilevel takes
    the upper gradient of y's steps at θ. BOME (Ye et al. 2022, arXiv 2209.08709) has the same
    gradients with another bookkeeping: y is the variable that is kept, θ starts from y in every
    iteration, and λ = max(0, η − ⟨∇L_upper, ∇q⟩ / ‖∇q‖²) with q the difference of the lower losses
    and ∇ that to (y, φ); that rule for λ is not offered here.

    Raises:
        ValueError: strength ≤ 0 or steps < 1.
    """

    strength: float | Schedule
    steps: int | None = None
    optimizer: Optimizer | None = None

    def __post_init__(self) -> None:
        if not callable(self.strength):
            require(self, "strength", self.strength, low_open=True)
        if self.steps is not None:
            require(self, "steps", self.steps, low=1)

    def check(
        self, problem: Problem, optimizer: DifferentiableOptimizer, unroll_steps: int
    ) -> None:
        """Accept any problem, optimizer and window."""

    def init(
        self, optimizer: DifferentiableOptimizer, lower_params: Params, upper_params: Params
    ) -> PenaltyMemory:
        """Return the memory before the first window: y = θ."""
        params = tree.map(lambda leaf: leaf.detach().clone(), lower_params)
        return PenaltyMemory(
            params, (self.optimizer or optimizer).init(params), torch.zeros((), dtype=torch.int64)
        )

    def record(self, window: Window, upper_batch: Batch, memory: PenaltyMemory) -> PenaltyRecord:
        """Return what will let y follow the steps of this window, and compare where both end."""
        return PenaltyRecord(self, window, upper_batch, memory)

    def strength_after(self, updates: int) -> float:
        """Return λ after so many hypergradients."""
        strength = float(self.strength(updates)) if callable(self.strength) else self.strength
        if not strength > 0.0:
            raise ValueError(
                f"Penalty: strength must be positive, the schedule gave {strength} after {updates} "
                "hypergradients"
            )
        return strength


class PenaltyRecord:
    """The batches and random states of the lower steps, on which y takes its own."""

    def __init__(
        self, method: Penalty, window: Window, upper_batch: Batch, memory: PenaltyMemory
    ) -> None:
        self._method, self._window = method, window
        self._upper_batch, self._memory = upper_batch, memory
        self._upper_params = tree.map(Tensor.detach, window.upper_params)
        self._steps: list[_Step] = []
        self._notes: tuple[str, ...] = ()  # of the upper loss

    def before(self, number: int, point: Point, random: RandomState) -> PassRequest:
        """Ask for nothing: the steps are plain."""
        return PassRequest()

    def after(self, step: Step) -> None:
        """Keep the micro-batches, with their weights, and from where they drew."""
        self._steps.append(_Step(step.random, replace(step.passed, grads=None)))

    def hypergradient(self, end: Point) -> HypergradientResult:
        """Let y take its steps, and return the hypergradient at θ and y."""
        strength = self._method.strength_after(int(self._memory.updates))
        memory = self._follow(strength)
        return self._compare(end.lower_params, memory, strength)

    def _follow(self, strength: float) -> PenaltyMemory:
        """Return y and its optimizer's state after its steps."""
        problem, method, recorded = self._window.problem, self._method, self._steps
        optimizer = method.optimizer or self._window.optimizer
        mover = _decaying(optimizer, strength / (1.0 + strength))
        params, state, _ = self._memory
        steps = len(recorded) if method.steps is None else method.steps
        for index in range(-steps, 0):
            start, passed = recorded[index % len(recorded)]
            with random_state.rewound_to(start, params):
                upper = upper_gradient(problem, params, self._upper_params, self._upper_batch)
            self._notes = upper.notes
            total = tree.scale(1.0 / (1.0 + strength), upper.lower)
            del upper
            for micro, share in zip(passed.micro_batches, passed.shares, strict=True):
                grads = _lower_gradient(problem, micro, params, self._upper_params)
                total = tree.axpy(share * strength / (1.0 + strength), grads, total)
                del grads
            with torch.no_grad():
                params, state = mover.update(total, state, params)
        return PenaltyMemory(params, state, self._memory.updates + 1)

    def _compare(
        self, params: Params, memory: PenaltyMemory, strength: float
    ) -> HypergradientResult:
        """Return the hypergradient at θ and y."""
        problem, start = self._window.problem, self._steps[-1].start
        upper_params, upper_batch = self._upper_params, self._upper_batch
        with random_state.rewound_to(start, params), torch.no_grad():
            upper_loss, aux = upper_value(problem, params, upper_params, upper_batch)
        leaves = as_leaves(upper_params)
        with random_state.rewound_to(start, params), torch.enable_grad():
            copy_loss, _ = upper_value(problem, memory.params, leaves, upper_batch)
            direct = gradients([copy_loss], leaves)
        micro_batches = [micro for step in self._steps for micro in step.passed.micro_batches]
        total = sum(micro.size for micro in micro_batches)
        difference, gap = tree.map(lambda _: None, upper_params), torch.zeros(())
        for micro in micro_batches:
            with torch.enable_grad():
                excess = _excess(problem, micro, params, memory.params, leaves)
                grads = gradients([excess], leaves)
            difference = tree.axpy(micro.size / total, grads, difference)
            gap = gap + excess.detach() * (micro.size / total)
        with torch.no_grad():
            hypergradient = tree.axpy(strength, difference, direct)
            distance = tree.norm(tree.axpy(-1.0, params, memory.params))
        notes = self._notes
        if gap < 0.0:
            notes = (
                *notes,
                "Penalty: the lower loss of θ exceeds that of its copy, so θ is not at its minimum "
                f"and λ = {strength:g} multiplies the error; take more lower steps per window, or "
                "a smaller λ",
            )
        return HypergradientResult(
            upper_loss=upper_loss.detach(),
            hypergradient=hypergradient,
            memory=memory,
            figures={
                "strength": torch.tensor(strength, dtype=torch.float64),
                "distance": distance,
                "gap": gap,
                "copy_upper_loss": copy_loss.detach(),
            },
            notes=notes,
            upper_aux=detached(aux),
        )


def _decaying(optimizer: Optimizer, share: float) -> Optimizer:
    """Return the optimizer with that share of its weight decay, if it has any."""
    decay = getattr(optimizer, "weight_decay", 0.0)
    if not decay or not is_dataclass(optimizer):
        return optimizer
    return replace(optimizer, weight_decay=decay * share)


def _lower_gradient(
    problem: Problem, micro: MicroBatch, params: Params, upper_params: Params
) -> Tree:
    """Return ∇_y L_lower on a micro-batch that θ has seen; weights of detached features as then."""
    with torch.enable_grad(), random_state.rewound_to(micro.random, params):
        leaves = as_leaves(params)
        if is_separable(problem):
            assert micro.weights is not None
            losses, _ = problem.losses(leaves, micro.batch)
            loss = weighted_mean(micro.weights.detach(), losses)
        else:
            loss, _ = lower_value(problem, leaves, upper_params, micro.batch)
        return gradients([loss], leaves)


def _excess(
    problem: Problem, micro: MicroBatch, params: Params, copy: Params, upper_params: Params
) -> Float[Tensor, ""]:
    """Return L_lower(y, φ) − L_lower(θ, φ) on a micro-batch, with a graph to φ."""

    def value(at: Params) -> Float[Tensor, ""]:
        with random_state.rewound_to(micro.random, params):
            return lower_value(problem, at, upper_params, micro.batch)[0]

    if not is_separable(problem):
        return value(copy) - value(params)
    with torch.no_grad():
        with random_state.rewound_to(micro.random, params):
            losses, features = problem.losses(params, micro.batch)
        with random_state.rewound_to(micro.random, params):
            copies, _ = problem.losses(copy, micro.batch)
    weights = problem.weights_of(upper_params, micro.batch, features, losses)
    return weighted_mean(weights, copies - losses)
