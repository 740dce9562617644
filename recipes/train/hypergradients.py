"""From options to the hypergradient of a run: which of the core's four, with what settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bilevel import (
    Auto,
    CentralDifference,
    ConjugateGradient,
    Dot,
    Ghost,
    Implicit,
    Jvp,
    Neumann,
    Nystrom,
    OneStep,
    Penalty,
    PerExample,
    Reverse,
    Unrolled,
)
from bilevel.hypergradients.base import Hypergradient
from bilevel.hypergradients.linear.system import LinearSolver
from bilevel.routes import Route
from recipes.options.train import TrainOptions


def make_hypergradient(options: TrainOptions) -> Hypergradient:
    """Return the hypergradient that the options name.

    Raises:
        ValueError: The hypergradient refuses its settings.
    """
    hypergradients: Mapping[str, Callable[[], Hypergradient]] = {
        "one-step": lambda: OneStep(
            _route(options), order=options.order, direction_decay=options.direction_decay
        ),
        "unrolled": Unrolled,
        "implicit": lambda: Implicit(_linear_solver(options)),
        "penalty": lambda: Penalty(options.penalty_strength),
    }
    return hypergradients[options.hypergradient]()


def differentiated_steps(options: TrainOptions) -> int:
    """Return how many lower steps of a window have batches that the hypergradient sees."""
    return options.unroll_steps if options.hypergradient in ("unrolled", "penalty") else 1


def _route(options: TrainOptions) -> Route:
    radius = options.difference_radius
    routes: Mapping[str, Callable[[], Route]] = {
        "auto": Auto,
        "dot": Dot,
        "ghost": Ghost,
        "per-example": PerExample,
        "jvp": Jvp,
        "reverse": Reverse,
        "central-difference": lambda: CentralDifference(radius=radius),
    }
    return routes[options.route]()


def _linear_solver(options: TrainOptions) -> LinearSolver:
    solvers: Mapping[str, Callable[[], LinearSolver]] = {
        "nystrom": lambda: Nystrom(options.solver_iterations, options.damping),
        "cg": lambda: ConjugateGradient(options.solver_iterations, damping=options.damping),
        "neumann": lambda: Neumann(options.solver_iterations, damping=options.damping),
    }
    return solvers[options.linear_solver]()
