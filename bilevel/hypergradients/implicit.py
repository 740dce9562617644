"""The hypergradient at a stationary point of the lower level, by the implicit function theorem."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import optree
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bilevel import tree
from bilevel.autodiff import random_state
from bilevel.autodiff.gradient import as_leaves, upper_gradient
from bilevel.autodiff.random_state import RandomState
from bilevel.checks import require
from bilevel.hypergradients.base import HypergradientResult
from bilevel.hypergradients.linear.iterative import ConjugateGradient
from bilevel.hypergradients.linear.system import LinearSolution, LinearSolver
from bilevel.lower.hessian_product import hessian_product
from bilevel.lower.lower_pass import LowerPass, lower_pass
from bilevel.lower.mixed_product import mixed_product
from bilevel.lower.route import Product
from bilevel.lower.steps import PassRequest, Point, Step, Window
from bilevel.optimizers.base import DifferentiableOptimizer
from bilevel.problem import Batch, Params, Problem
from bilevel.routes import Auto, CentralDifference, Jvp, Reverse, Route
from bilevel.tree import Tree


class StationarityWarning(UserWarning):
    """The lower level is not where ``Implicit`` assumes it to be."""


class ImplicitMemory(NamedTuple):
    """What ``Implicit`` keeps between windows.

    Attributes:
        solution: q like θ (at least float32), the next warm start; None without ``warm_start``.
        warned: Whether ``StationarityWarning`` has been given.
    """

    solution: Tree
    warned: Bool[Tensor, ""]


@dataclass(frozen=True)
class Implicit:
    """The hypergradient of the solved lower level, whichever way it was solved.

    The lower steps of a window are taken plainly. At θ, where they end, with L the lower loss on
    the batches of the last step, v = ∇_θ L_upper(θ, φ) and H = ∇²_θθ L(θ, φ)::

        H q = v        dL_upper/dφ = ∂L_upper/∂φ − ∂/∂φ ⟨∇_θ L(θ, φ), q⟩

    Assumes ∇_θ L(θ, φ) = 0 and an invertible H there. The first is measured, on the same batches::

        stationarity = (‖g‖ / ⟨u, H u⟩) / ‖θ‖,    g = ∇_θ L(θ, φ),  u = g / ‖g‖

    the length of the step to the minimiser of L along −g, relative to θ; ∞ if the loss curves
    downwards there. It does not change with the scales of loss and parameters, and does not depend
    on the learning rate. Away from a stationary point q and the mixed product are those of
    different lower solutions, and the hypergradient may even have the wrong signs: take more lower
    steps, or differentiate through those that are taken (``OneStep``, ``Unrolled``). On the
    logistic regression of the tests the relative error of the hypergradient stays within a factor
    of ten of the figure while both fall by six orders of magnitude. Mini-batches add their noise to
    it, which ``bilevel.stationarity`` tells apart; the whole training set as micro-batches of the
    last step has none. Parameters that the lower loss does not depend on are not part of the
    system. Where the solver finds nothing better than q = 0, as at an indefinite H, there is no
    hypergradient: it is NaN, and no upper step is taken.

    H is that of autograd: features of a ``ReweightingProblem`` with ``detach_features``, and what
    the loss computes by ``.detach()`` or under ``torch.no_grad``, are constants in it. It is then
    symmetric, but where these depend on θ, the solution moves with φ as if they did not: 150 % from
    its derivative was seen on a Meta-Weight-Net fed with the loss. ``detach_features=False``
    attaches the features; ``check_hypergradient(..., solve_steps=N)`` measures the distance.

    ``StepInfo.figures`` has, beside it, ``residual``, ``iterations`` and ``products`` of the solver
    and ``upper_change = −⟨q, g⟩``, what solving the lower level to the end would add to the upper
    loss, to first order (a dual-weighted residual).

    Args:
        solver: Of H q = v; its damping δ makes that (H + δ I) q = v.
        warm_start: Start the solver at the last q.
        product: ``Auto``, ``Jvp``, ``Reverse`` or ``CentralDifference``: how products with H (see
            ``hessian_product``) and the mixed product are computed. ``Auto``: ``Jvp``, and
            ``Reverse`` where that fails.
        stationarity_tolerance: A larger stationarity adds a note and, once in a run,
            ``StationarityWarning``. None: not measured, one product less.

    Cost per window beside the lower steps: 3F upper, 3F for the gradient at θ, the products of the
    solver and one for the stationarity (9F each with ``Jvp``, see ``hessian_product``), 3F for the
    mixed product. Memory: a few copies of θ, as the solver says, and one for the warm start.

    Source: Bengio 2000; Pedregosa 2016 (arXiv 1602.02355); Lorraine, Vicol and Duvenaud 2020 (arXiv
    1911.02590); Hataya and Yamada 2023 (arXiv 2302.09726) for Nyström. Betty's cg and neumann see
    the last micro-batch only, and neither it nor TorchOpt, JAXopt or hypertorch measure how far the
    lower level is from stationary.
    """

    solver: LinearSolver = ConjugateGradient()
    warm_start: bool = True
    product: Auto | Jvp | Reverse | CentralDifference = Auto()
    stationarity_tolerance: float | None = 1e-2

    lower_route: ClassVar[Route] = Jvp()
    last_step_only: ClassVar[bool] = True
    at_solution: ClassVar[bool] = True
    over_ranks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.solver, type) or not hasattr(self.solver, "solve"):
            raise TypeError(
                "Implicit: solver must be ConjugateGradient(), Neumann(...), Nystrom(...), Dense() "
                f"or an object with solve, got {self.solver!r}"
            )
        if isinstance(self.product, type) or not getattr(self.product, "second_order", False):
            raise ValueError(
                "Implicit: product must be Auto(), Jvp(), Reverse() or CentralDifference(), got "
                f"{self.product!r}"
            )
        if self.stationarity_tolerance is not None:
            require(self, "stationarity_tolerance", self.stationarity_tolerance)

    def check(
        self, problem: Problem, optimizer: DifferentiableOptimizer, unroll_steps: int
    ) -> None:
        """Raise ValueError if the optimizer's fixed points are not those of the lower loss."""
        decay = getattr(optimizer, "weight_decay", 0.0)
        if decay:
            raise ValueError(
                f"Implicit: the lower optimizer's weight_decay={decay:g} pulls θ away from where "
                "∇_θ L_lower = 0; set weight_decay=0.0 and add weight_decay / 2 · ‖θ‖² to the "
                "lower loss, where the Hessian sees it"
            )

    def init(
        self, optimizer: DifferentiableOptimizer, lower_params: Params, upper_params: Params
    ) -> ImplicitMemory:
        """Return the memory before the first window: no warm start, no warning given."""
        return ImplicitMemory(
            _warm_start(lower_params, lower_params, 0.0) if self.warm_start else None,
            torch.zeros((), dtype=torch.bool),
        )

    def record(
        self, window: Window, upper_batch: Batch, memory: ImplicitMemory | None
    ) -> ImplicitRecord:
        """Return what will differentiate where the steps of this window end."""
        if memory is None:
            start = window.start.lower_params
            memory = self.init(window.optimizer, start, window.upper_params)
        return ImplicitRecord(self, window, upper_batch, memory)


class ImplicitRecord:
    """From where the last lower step drew its random numbers, and the hypergradient after it."""

    def __init__(
        self, method: Implicit, window: Window, upper_batch: Batch, memory: ImplicitMemory
    ) -> None:
        self._method, self._window = method, window
        self._upper_batch, self._memory = upper_batch, memory

    def before(self, number: int, point: Point, random: RandomState) -> PassRequest:
        """Ask for nothing: the steps are plain."""
        return PassRequest()

    def after(self, step: Step) -> None:
        """Keep the random state of the last step."""
        self._random = step.random

    def hypergradient(self, end: Point) -> HypergradientResult:
        """Return the hypergradient at θ, where the steps ended."""
        method, problem, params = self._method, self._window.problem, end.lower_params
        upper_params = tree.map(Tensor.detach, self._window.upper_params)
        leaves, memory = as_leaves(upper_params), self._memory
        with random_state.rewound_to(self._random, params):
            passed = lower_pass(
                problem,
                method.lower_route,
                params,
                leaves,
                self._window.batches[-1],
                differentiate=True,
                collective=self._window.collective,
            )
        with random_state.rewound_to(self._random, params):
            upper = upper_gradient(
                problem, params, upper_params, self._upper_batch, self._window.collective
            )
        hessian = hessian_product(problem, method.product, passed, params, upper_params)
        rhs = _restricted(upper.lower, passed.grads)
        solved = method.solver.solve(hessian, rhs, memory.solution if method.warm_start else None)
        unsolved = solved.residual > 0.0 and float(tree.norm(solved.solution)) == 0.0
        if unsolved or math.isnan(solved.residual):  # the solver of the run skips the upper step
            unknown = tree.map(lambda leaf: torch.full_like(leaf, math.nan), solved.solution)
            solved = solved._replace(solution=unknown)
        figures = _figures(solved, passed.grads)
        name = type(method.solver).__name__
        notes = (*passed.remarks, *upper.notes, *(f"{name}(): {note}" for note in solved.notes))
        warned = memory.warned
        if method.stationarity_tolerance is not None:
            distance = _stationarity(hessian, passed, params)
            figures["stationarity"] = torch.tensor(distance, dtype=torch.float64)
            if not distance <= method.stationarity_tolerance:
                notes += (_not_stationary(distance, method.stationarity_tolerance),)
                if not warned:  # at the call of ``BilevelSolver.step`` or ``window``
                    warnings.warn(notes[-1], StationarityWarning, stacklevel=5)
                warned = torch.ones_like(warned)
        del hessian  # with ``Reverse`` it holds a graph
        against = tree.scale(-1.0, solved.solution)
        mixed = mixed_product(problem, method.product, passed, params, leaves, against)
        notes += passed.notes
        with torch.no_grad():
            hypergradient = tree.add(mixed, upper.direct)
        warm = _warm_start(solved.solution, params) if method.warm_start else None
        return HypergradientResult(
            upper_loss=upper.loss,
            hypergradient=hypergradient,
            memory=ImplicitMemory(warm, warned),
            figures=figures,
            notes=notes,
            upper_aux=upper.aux,
        )


def _restricted(upper: Tree, grads: Tree) -> Tree:
    """Return v on the parameters that the lower loss depends on, 0 where the upper loss does not.

    The others stay where they are whatever φ is: for them H would be singular.
    """

    def leaf(gradient: Tensor | None, v: Tensor | None) -> Tensor | None:
        if gradient is None:
            return None
        return torch.zeros_like(gradient) if v is None else v

    result: Tree = optree.tree_map(leaf, grads, upper, none_is_leaf=True)
    return result


def _stationarity(hessian: Product, passed: LowerPass, params: Params) -> float:
    """Return (‖g‖ / ⟨u, H u⟩) / ‖θ‖ with u = g / ‖g‖.

    0 where g is rounding (‖g‖ ‖θ‖ below that of the loss), whose direction means nothing.
    """
    grads = passed.grads
    length = float(tree.norm(grads))
    reach = float(tree.norm(tree.map(lambda leaf, _: leaf, params, grads)))
    pairs = zip(passed.micro_batches, passed.shares, strict=True)
    here = sum(share * float(micro.loss) for micro, share in pairs)
    of_ranks = passed.collective.gathered(torch.tensor([here], dtype=torch.float64))
    loss = abs(sum(float(part) for part in of_ranks))
    eps = max((torch.finfo(leaf.dtype).eps for leaf in tree.leaves(grads)), default=0.0)
    if length == 0.0 or length * reach <= eps * loss:
        return 0.0
    unit = tree.scale(1.0 / length, grads)
    curvature = float(tree.vdot(unit, hessian(unit)))
    if curvature <= 0.0 or reach == 0.0:
        return math.inf
    return length / curvature / reach


def _not_stationary(stationarity: float, tolerance: float) -> str:
    return (
        f"the lower level is far from stationary: along its gradient the minimum lies "
        f"{stationarity:.2g} · ‖θ‖ away (stationarity_tolerance {tolerance:g}), so the implicit "
        "hypergradient may be far off, even in its signs; take more lower steps or larger batches, "
        "or choose a hypergradient through the steps that are taken (OneStep, Unrolled)"
    )


def _figures(solved: LinearSolution, grads: Tree) -> dict[str, Float[Tensor, ""]]:
    numbers = {
        "residual": solved.residual,
        "iterations": float(solved.iterations),
        "products": float(solved.products),
        "upper_change": -float(tree.vdot(solved.solution, grads)),
    }
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}


def _warm_start(solution: Tree, params: Params, factor: float = 1.0) -> Tree:
    """Return the solution times ``factor``, like θ in at least float32; 0 where it has no leaf."""

    def leaf(q: Tensor | None, p: Tensor | None) -> Tensor | None:
        if p is None:
            return None
        dtype = torch.promote_types(p.dtype, torch.float32)
        if q is None or factor == 0.0:
            return torch.zeros_like(p, dtype=dtype)
        return q.detach().to(dtype)

    result: Tree = optree.tree_map(leaf, solution, params, none_is_leaf=True)
    return result
