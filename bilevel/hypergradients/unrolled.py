"""The hypergradient through several lower steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bilevel import tree
from bilevel.autodiff import random_state
from bilevel.autodiff.gradient import as_leaves, upper_gradient
from bilevel.autodiff.random_state import RandomState
from bilevel.checks import require
from bilevel.hypergradients.base import HypergradientResult
from bilevel.hypergradients.trajectory import (
    Kept,
    Point,
    Store,
    advance,
    backwards,
    keep,
    way_points,
)
from bilevel.lower.lower_pass import LowerPass, lower_pass
from bilevel.lower.mixed_product import mixed_product
from bilevel.lower.second_derivatives import second_derivatives
from bilevel.optimizers.base import DifferentiableOptimizer
from bilevel.problem import Batch, Params, Problem
from bilevel.routes import Auto, CentralDifference, Jvp, Reverse


class _Step(NamedTuple):
    """What the sweep must know of a step besides its gradient and point."""

    random: RandomState
    passed: LowerPass  # without gradients


class _Record(NamedTuple):
    """What is remembered of the steps that are unrolled.

    Attributes:
        steps: One each.
        points: Before the first and every `length`-th step, each a list whose further entries,
            the `way_points` to the end, the last list alone has; with their index since the first.
        grads: Gradients of the steps since the last of these.
        leaves: φ as the steps saw it, with a graph to their weights.
        length: Steps between points.
    """

    steps: list[_Step]
    points: list[list[tuple[int, Kept]]]
    grads: list[Kept]
    leaves: Params
    length: int


@dataclass(frozen=True)
class Unrolled:
    """Exact derivative of the upper loss through the last `steps` lower steps of a window.

    With the step (θ_{k+1}, s_{k+1}) = U(g_k, s_k, θ_k), g_k = ∇_θ L_k(θ_k, φ), the sweep starts at
    θ̄ = ∇_θ L_upper(θ_K, φ), s̄ = 0, h = ∂L_upper/∂φ and goes through the steps, last one first::

        (ḡ, s̄, θ̄) ← (∂U/∂(g, s, θ))ᵀ (θ̄, s̄)           `optimizer.vjp`, no graph
        θ̄ ← θ̄ + ∂²L_k/∂θ² ḡ,   h ← h + ∂²L_k/∂φ∂θ ḡ    one pass, see `second_derivatives`

    At the first step only h is needed (`mixed_product`). There is never a graph across steps. It
    holds for every optimizer of `bilevel.optimizers`, with weight decay, schedule, clipping (the
    scale a constant, unless the optimizer says `differentiate_clip`), micro-batches, and random
    numbers, which are replayed. With ``steps=1`` it is `OneStep` in order lower-first.

    Args:
        steps: T, how many of the window's last lower steps; the point before them counts as a
            constant. None: all. Fewer leave out (1 − lr·curvature)^T of the answer where the lower
            level has settled, and more where it has not (Shaban et al. 2019, arXiv 1810.10667).
        replay: What is remembered of the steps, P being the size of θ and S that of θ and the
            optimizer's state (3P for Adam). All choices give the same numbers bit for bit (on
            devices whose kernels do).

            - None: the gradients, T·P + (1 + log₂ T)·S, or T·P + S for SGD without momentum; points
              are replayed from them by the elementwise update, about (T/2) log₂ T − T updates in
              all, no pass through the model.
            - k: the point before every k-th step, (T/k + log₂ k)·S + k·P, and all gradients but
              those of the last k steps are computed twice: (T − k)·3F more.
            - "sqrt": k = ⌈√T⌉.
        store: "host": what is remembered lies in CPU memory, and the device holds what one step
            needs, whatever T.
        product: `Jvp`, `Reverse` or `CentralDifference`: how second derivatives are computed.
            `Auto`: `Jvp` at the first step, whose derivative is in φ alone, and `Reverse` at the
            others, where both take as long and `Jvp` (forward over reverse) takes more memory.

    Cost: 3F for each lower step and 3F for the upper gradient, as in every method, then about
    9F for each of T − 1 steps and 3F for the first (9F without detached features). F is a
    forward pass. Memory besides what is remembered: that of one micro-batch's second
    derivative, and the graph from φ to the weights of each step. Double backward through the
    graph of all steps takes about 9F per step in all, so this one comes to 15/13 of its
    arithmetic for T = 4 and to 4/3 for large T: what it pays for memory that does not grow with
    the activations.

    Source: reverse sweep of Maclaurin et al. 2015 (arXiv 1502.03492) and Franceschi et al. 2017
    (arXiv 1703.01785); forward over reverse in each step is MixFlow-MG's (arXiv 2505.00793).
    TorchOpt's MetaOptimizer and higher keep the graph of all steps and give NaN through Adam where
    a gradient is 0; Betty truncates at one step.

    Raises:
        ValueError: steps or replay below 1, or an unknown replay, store or product.
    """

    steps: int | None = None
    replay: int | Literal["sqrt"] | None = None
    store: Store = "device"
    product: Auto | Jvp | Reverse | CentralDifference = Auto()

    def __post_init__(self) -> None:
        if self.steps is not None:
            require(self, "steps", self.steps, low=1)
        if isinstance(self.replay, int):
            require(self, "replay", self.replay, low=1)
        elif self.replay not in (None, "sqrt"):
            raise ValueError(
                f"Unrolled: replay must be None, an int or 'sqrt', got {self.replay!r}"
            )
        if self.store not in ("device", "host"):
            raise ValueError(f"Unrolled: store must be 'device' or 'host', got {self.store!r}")
        if not isinstance(self.product, Auto | Jvp | Reverse | CentralDifference):
            raise ValueError(
                "Unrolled: product must be Auto(), Jvp(), Reverse() or CentralDifference(), got "
                f"{self.product!r}"
            )

    def check(
        self, problem: Problem, optimizer: DifferentiableOptimizer, unroll_steps: int
    ) -> None:
        """Raise ValueError if the window is shorter than `steps` or the optimizer has no `vjp`."""
        if self.steps is not None and self.steps > unroll_steps:
            raise ValueError(
                f"Unrolled: steps={self.steps} do not fit a window of unroll_steps={unroll_steps}; "
                f"set unroll_steps={self.steps}, or steps=None for all of the window"
            )
        if not hasattr(optimizer, "vjp"):
            raise ValueError(
                f"Unrolled: {type(optimizer).__name__} has no vjp, the derivative of its update; "
                "choose a lower optimizer of bilevel.optimizers"
            )

    def exact_steps(self, unroll_steps: int) -> int:
        """Return through how many of the last lower steps the derivative is exact."""
        return unroll_steps if self.steps is None else min(self.steps, unroll_steps)

    def init(
        self, optimizer: DifferentiableOptimizer, lower_params: Params, upper_params: Params
    ) -> None:
        """Return no memory."""
        return None

    def window(
        self,
        problem: Problem,
        optimizer: DifferentiableOptimizer,
        lower_params: Params,
        upper_params: Params,
        optimizer_state: Any,
        batches: Sequence[Sequence[Batch]],
        upper_batch: Batch | None = None,
        memory: None = None,
    ) -> HypergradientResult:
        """Take the steps of a window and, given an upper batch, differentiate through the last."""
        upper_params = tree.map(Tensor.detach, upper_params)
        unrolled = 0 if upper_batch is None else self.exact_steps(len(batches))
        record = _Record([], [], [], as_leaves(upper_params), self._segment(unrolled))
        point, passes = Point(lower_params, optimizer_state), []
        for index, micro_batches in enumerate(batches, unrolled - len(batches)):
            if index >= 0:
                self._put_by(record, point, index, unrolled)
            random = random_state.capture(lower_params)
            passed = lower_pass(
                problem,
                self._further,
                point.lower_params,
                record.leaves if index >= 0 else upper_params,
                micro_batches,
            )
            point = advance(optimizer, point, passed.grads)
            passes.append(passed.summary())
            if index >= 0:
                record.grads.append(keep(passed.grads, self.store))
                record.steps.append(_Step(random, replace(passed, grads=None)))
        result = HypergradientResult(*point, tuple(passes), None, None, memory, {}, ())
        if upper_batch is None:
            return result
        del point, passed
        return self._sweep(problem, optimizer, record, upper_batch, result)

    def _sweep(
        self,
        problem: Problem,
        optimizer: DifferentiableOptimizer,
        record: _Record,
        upper_batch: Batch,
        result: HypergradientResult,
    ) -> HypergradientResult:
        """Go back through the steps. What is used up is freed before the next pass."""
        steps, points, grads, leaves, length = record
        unrolled, upper_params = len(steps), tree.map(Tensor.detach, leaves)
        with random_state.replay(steps[-1].random, result.lower_params):
            upper = upper_gradient(problem, result.lower_params, upper_params, upper_batch)
        result = result._replace(upper_loss=upper.loss, upper_aux=upper.aux)
        lower_bar, state_bar, total = upper.lower, None, upper.direct
        del upper
        while points:
            first = (len(points) - 1) * length
            if first + length < unrolled:
                again = steps[first : first + length]
                grads = self._again(problem, optimizer, points[-1], upper_params, again)
            for g, (params, state) in backwards(optimizer, points.pop(), grads, self.store):
                passed = steps.pop().passed
                if not steps and state_bar is None:
                    along = optimizer.grads_vjp(g, state, params, lower_bar)
                else:
                    along, state_bar, lower_bar = optimizer.vjp(
                        g, state, params, lower_bar, state_bar
                    )
                del g, state
                if not steps:
                    del lower_bar, state_bar
                    product = mixed_product(problem, self._first, passed, params, leaves, along)
                else:
                    curved, product = second_derivatives(
                        problem, self._further, passed, params, leaves, along
                    )
                    with torch.no_grad():
                        lower_bar = tree.add(lower_bar, curved)
                    del curved
                with torch.no_grad():
                    total = tree.add(product, total)
        return result._replace(hypergradient=total)

    @property
    def _first(self) -> Jvp | Reverse | CentralDifference:
        return Jvp() if isinstance(self.product, Auto) else self.product

    @property
    def _further(self) -> Jvp | Reverse | CentralDifference:
        return Reverse() if isinstance(self.product, Auto) else self.product

    def _segment(self, unrolled: int) -> int:
        """Return the number of steps between kept points."""
        if self.replay is None:
            return max(unrolled, 1)
        return math.ceil(math.sqrt(max(unrolled, 1))) if self.replay == "sqrt" else self.replay

    def _put_by(self, record: _Record, point: Point, index: int, unrolled: int) -> None:
        """Keep the point before a step, if the sweep will start from it."""
        offset = index % record.length
        if offset == 0:
            for earlier in record.points:
                del earlier[1:]
            record.points.append([])
            record.grads.clear()
        if offset in way_points(point, min(record.length, unrolled - index + offset)):
            record.points[-1].append((offset, keep(point, self.store)))

    def _again(
        self,
        problem: Problem,
        optimizer: DifferentiableOptimizer,
        points: list[tuple[int, Kept]],
        upper_params: Params,
        steps: Sequence[_Step],
    ) -> list[Kept]:
        """Return the gradients of steps that were taken before; puts by `way_points`."""
        grads = []
        point = points[0][1].fetch()
        wanted = way_points(point, len(steps))
        for index, step in enumerate(steps):
            if index and index in wanted:
                points.append((index, keep(point, self.store)))
            with random_state.replay(step.random, point.lower_params):
                passed = lower_pass(
                    problem,
                    self._further,
                    point.lower_params,
                    upper_params,
                    [micro.batch for micro in step.passed.micro_batches],
                )
            grads.append(keep(passed.grads, self.store))
            if index + 1 < len(steps):
                point = advance(optimizer, point, passed.grads)
        return grads
