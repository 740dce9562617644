"""The hypergradient through several lower steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from bilevel import tree
from bilevel.autodiff import random_state
from bilevel.autodiff.gradient import as_leaves, upper_gradient
from bilevel.autodiff.random_state import RandomState
from bilevel.checks import require
from bilevel.hypergradients.base import HypergradientResult, Taken
from bilevel.hypergradients.one_graph import through_one_graph
from bilevel.hypergradients.replay_memory import (
    Kept,
    Store,
    backwards,
    keep,
    way_points,
)
from bilevel.lower.kept_graph import is_small
from bilevel.lower.lower_pass import LowerPass, lower_pass
from bilevel.lower.mixed_product import mixed_product
from bilevel.lower.second_order import second_derivatives
from bilevel.lower.steps import PassRequest, Point, Step, Window, advance
from bilevel.optimizers.base import DifferentiableOptimizer
from bilevel.problem import Batch, Params, Problem
from bilevel.routes import Auto, CentralDifference, Jvp, Reverse, Route

T = TypeVar("T")


class _Step(NamedTuple):
    """What the sweep must know of a step besides its gradient and point."""

    random: RandomState
    passed: LowerPass  # without gradients


@dataclass(frozen=True)
class Unrolled:
    """Exact derivative of the upper loss through the last ``steps`` lower steps of a window.

    With the step (θ_{k+1}, s_{k+1}) = U(g_k, s_k, θ_k), g_k = ∇_θ L_k(θ_k, φ), the sweep starts at
    θ̄ = ∇_θ L_upper(θ_K, φ), s̄ = 0, h = ∂L_upper/∂φ and goes through the steps, last one first::

        (ḡ, s̄, θ̄) ← (∂U/∂(g, s, θ))ᵀ (θ̄, s̄)           optimizer.vjp, no graph
        θ̄ ← θ̄ + ∂²L_k/∂θ² ḡ,   h ← h + ∂²L_k/∂φ∂θ ḡ    one pass, see second_derivatives

    At the first step only h is needed (``mixed_product``). There is a graph across steps on small
    problems only (see ``product``), where it takes less time. It holds for every optimizer of
    ``bilevel.optimizers``, with weight decay, schedule, clipping (the scale a constant, unless the
    optimizer says ``differentiate_clip``), micro-batches, and random numbers, which are rewound.
    With ``steps=1`` it is ``OneStep`` in order lower-first.

    ∂²L_k/∂θ² is that of autograd, as in TorchOpt and higher: features of a ``ReweightingProblem``
    with ``detach_features``, and what a loss computes by ``.detach()`` or under ``torch.no_grad``,
    are the constants that they were at step k, although θ_k depends on φ. With features that depend
    on θ this was 1 to 7 % from the derivative in which they move, on a Meta-Weight-Net fed with
    the loss over 2 and 4 steps, and 14 % with a ``.detach()``. ``detach_features=False`` attaches
    them; ``check_hypergradient`` measures the distance.

    Args:
        steps: T, how many of the window's last lower steps; the point before them counts as a
            constant. None: all. Fewer leave out (1 − lr·curvature)^T of the answer where the lower
            level has settled, and more where it has not (Shaban et al. 2019, arXiv 1810.10667).
        replay: What is remembered of the steps, P being the size of θ and S that of θ and the
            optimizer's state (3P for Adam). All choices give the same numbers bit for bit (on
            devices whose kernels do; on small problems, where None keeps graphs, up to rounding).

            - None: the gradients, T·P + (1 + log₂ T)·S, or T·P + S for SGD without momentum; points
              are replayed from them by the elementwise update, about (T/2) log₂ T − T updates in
              all, no pass through the model.
            - k: the point before every k-th step, (T/k + log₂ k)·S + k·P, and all gradients but
              those of the last k steps are computed twice: (T − k)·3F more.
            - "sqrt": k = ⌈√T⌉.
        store: "host": what is remembered lies in CPU memory, and the device holds what one step
            needs, whatever T.
        product: ``Jvp``, ``Reverse`` or ``CentralDifference``: how second derivatives are computed.
            ``Auto``: ``Jvp`` at the first step, whose derivative is in φ alone, and ``Reverse`` at
            the others, where both take as long and ``Jvp`` (forward over reverse) takes more
            memory; where one of them fails, the other. For small problems one backward pass
            through the graph of all steps, as TorchOpt goes, unless ``replay`` or ``store`` ask
            for less memory (``bilevel.lower.kept_graph``, ``bilevel.hypergradients.one_graph``);
            with several micro-batches or ``hyperparameters`` ``Reverse`` at all steps, through the
            graph of each.

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

    lower_route: ClassVar[Route] = Jvp()
    through_hyperparameters: ClassVar[bool] = True
    through_initial: ClassVar[bool] = True
    over_ranks: ClassVar[bool] = True

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
        if isinstance(self.product, type) or not getattr(self.product, "second_order", False):
            raise ValueError(
                "Unrolled: product must be Auto(), Jvp(), Reverse() or CentralDifference(), got "
                f"{self.product!r}"
            )

    def check(
        self, problem: Problem, optimizer: DifferentiableOptimizer, unroll_steps: int
    ) -> None:
        """Raise ValueError if the window is too short or the optimizer has no ``vjp``."""
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

    def record(self, window: Window, upper_batch: Batch, memory: None) -> UnrolledRecord:
        """Return what will remember the last steps of this window and go back through them."""
        return UnrolledRecord(self, window, upper_batch)

    def at_once(self, window: Window, upper_batch: Batch, memory: None) -> Taken | None:
        """Return the window and its hypergradient by one graph, if it is small and all goes well.

        Not where ``product``, ``replay`` or ``store`` ask for another way.
        """
        if self.product != Auto() or self.replay is not None or self.store != "device":
            return None
        steps = self.exact_steps(len(window.batches))
        return through_one_graph(window, upper_batch, self.lower_route, steps)

    def segment(self, unrolled: int) -> int:
        """Return the number of steps between kept points, of so many that are unrolled."""
        if self.replay is None:
            return max(unrolled, 1)
        return math.ceil(math.sqrt(max(unrolled, 1))) if self.replay == "sqrt" else self.replay


class UnrolledRecord:
    """The replay memory of a window, and the reverse sweep through its steps.

    Attributes:
        steps: One entry for each step that is unrolled.
        points: The points before the first and every ``segment``-th of these, each the head of a
            list; the last list alone goes on with the ``way_points`` to the end. With their index
            since the head.
        grads: Gradients of the steps since the last head.
        leaves: φ as the steps saw it, with a graph to their weights.
    """

    def __init__(self, method: Unrolled, window: Window, upper_batch: Batch) -> None:
        self.steps: list[_Step] = []
        self.points: list[list[tuple[int, Kept]]] = []
        self.grads: list[Kept] = []
        self.leaves = as_leaves(window.upper_params)
        self._method, self._window, self._upper_batch = method, window, upper_batch
        self._upper_params = tree.map(Tensor.detach, window.upper_params)
        self._unrolled = method.exact_steps(len(window.batches))
        self._constant = len(window.batches) - self._unrolled
        self._segment = method.segment(self._unrolled)
        self._product: Route = method.product
        self._keeps_graphs = False
        if method.product == Auto() and is_small(
            window.start.lower_params, window.batches[self._constant :]
        ):
            self._product = Reverse()  # with or without a graph that is kept: the same bits
            self._keeps_graphs = method.replay is None and method.store == "device"

    def before(self, number: int, point: Point, random: RandomState) -> PassRequest:
        """Keep the point before a step, if the sweep will start from it."""
        index = number - self._constant
        if index < 0:
            return PassRequest()
        offset = index % self._segment
        if offset == 0:
            for earlier in self.points:
                del earlier[1:]
            self.points.append([])
            self.grads.clear()
        steps = min(self._segment, self._unrolled - index + offset)
        # Beside graphs that are kept points are small, and replaying them is not.
        if self._keeps_graphs or offset in way_points(point, steps):
            self.points[-1].append((offset, keep(point, self._method.store)))
        return PassRequest(self.leaves, keep_graph=self._keeps_graphs)

    def after(self, step: Step) -> None:
        """Keep the gradient, and the micro-batches with the graphs to their weights."""
        if step.number >= self._constant:
            self.grads.append(keep(step.passed.grads, self._method.store))
            self.steps.append(_Step(step.random, replace(step.passed, grads=None)))

    def hypergradient(self, end: Point) -> HypergradientResult:
        """Go back through the steps. What is used up is freed before the next pass."""
        problem, optimizer, method = self._window.problem, self._window.optimizer, self._method
        steps, leaves = self.steps, self.leaves
        with random_state.rewound_to(steps[-1].random, end.lower_params):
            upper = upper_gradient(
                problem,
                end.lower_params,
                self._upper_params,
                self._upper_batch,
                self._window.collective,
            )
        upper_loss, upper_aux = upper.loss, upper.aux
        notes = [*upper.notes]
        lower_bar, state_bar, total = upper.lower, None, upper.direct
        del upper
        window, numbers_bar = self._window, None
        numbers, start_is_constant = window.numbers(), window.initial is None
        while self.points:
            first = (len(self.points) - 1) * self._segment
            if first + self._segment < self._unrolled:
                self.grads = self._recomputed_grads(steps[first : first + self._segment])
            for g, (params, state) in backwards(
                optimizer, self.points.pop(), self.grads, method.store
            ):
                passed = steps.pop().passed
                if numbers:
                    learnable: Any = optimizer
                    owed = learnable.hyperparameters_vjp(
                        numbers, g, state, params, lower_bar, state_bar
                    )
                    numbers_bar = owed if numbers_bar is None else tree.add(owed, numbers_bar)
                ends = not steps and start_is_constant  # where only the product in φ is needed
                if ends and state_bar is None:
                    along = optimizer.grads_vjp(g, state, params, lower_bar)
                else:
                    along, state_bar, lower_bar = optimizer.vjp(
                        g, state, params, lower_bar, state_bar
                    )
                del g, state
                if ends:
                    del lower_bar, state_bar
                    product = self._by_product(mixed_product, passed, params, leaves, along)
                else:
                    curved, product = self._by_product(
                        second_derivatives, passed, params, leaves, along
                    )
                    with torch.no_grad():
                        lower_bar = tree.add(lower_bar, curved)
                    del curved
                notes += passed.notes
                with torch.no_grad():
                    total = tree.add(product, total)
        if window.initial is not None or numbers:
            start_bar = None if window.initial is None else lower_bar
            total = tree.add(total, window.pulled_back(start_bar, numbers_bar or {}))
        once = tuple(dict.fromkeys(notes))
        return HypergradientResult(upper_loss, total, None, notes=once, upper_aux=upper_aux)

    def _by_product(self, compute: Callable[..., T], *arguments: Any) -> T:
        """Return what ``compute`` finds by the product's route.

        Where ``Reverse`` alone stood for ``Auto``, as on small problems, and fails, ``Auto`` takes
        what else there is, from there on.
        """
        try:
            return compute(self._window.problem, self._product, *arguments)
        except RuntimeError:
            if self._product == self._method.product:
                raise
            self._product = self._method.product
        return compute(self._window.problem, self._product, *arguments)

    def _recomputed_grads(self, steps: Sequence[_Step]) -> list[Kept]:
        """Return the gradients of a segment whose head is the last; keep its ``way_points``."""
        problem, optimizer, store = self._window.problem, self._window.optimizer, self._method.store
        points, grads = self.points[-1], []
        point = points[0][1].fetch()
        wanted = way_points(point, len(steps))
        for index, step in enumerate(steps):
            if index and index in wanted:
                points.append((index, keep(point, store)))
            with random_state.rewound_to(step.random, point.lower_params):
                passed = lower_pass(
                    problem,
                    self._method.lower_route,
                    point.lower_params,
                    self._upper_params,
                    [micro.batch for micro in step.passed.micro_batches],
                    collective=self._window.collective,
                )
            grads.append(keep(passed.grads, store))
            if index + 1 < len(steps):
                point = advance(optimizer, point, passed.grads)
        return grads
