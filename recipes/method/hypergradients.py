"""Build the hypergradient of a run from its options."""

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
from recipes.options.choices import (
    HypergradientOptions,
    ImplicitOptions,
    OneStepOptions,
    PenaltyOptions,
    UnrolledOptions,
)
from recipes.options.train import TrainOptions


def make_hypergradient(settings: HypergradientOptions) -> Hypergradient:
    """Return the hypergradient that the settings name.

    Raises:
        ValueError: The hypergradient refuses its settings.
    """
    match settings:
        case OneStepOptions():
            return OneStep(
                _route(settings),
                order=settings.order,
                direction_decay=settings.direction_decay,
                upper_gradient_every=settings.upper_gradient_every,
            )
        case UnrolledOptions():
            return Unrolled()
        case ImplicitOptions():
            return Implicit(_linear_solver(settings))
        case PenaltyOptions():
            return Penalty(settings.penalty_strength)


def differentiated_steps(options: TrainOptions) -> int:
    """Return the number of lower steps of a window whose batches the hypergradient uses."""
    window = isinstance(options.hypergradient, UnrolledOptions | PenaltyOptions)
    return options.upper.unroll_steps if window else 1


def upper_gradient_every(options: TrainOptions) -> int:
    """Return from how many upper steps to the next one reads its meta batch."""
    settings = options.hypergradient
    return settings.upper_gradient_every if isinstance(settings, OneStepOptions) else 1


def _route(settings: OneStepOptions) -> Route:
    radius = settings.difference_radius
    routes: Mapping[str, Callable[[], Route]] = {
        "auto": Auto,
        "dot": Dot,
        "ghost": Ghost,
        "per-example": PerExample,
        "jvp": Jvp,
        "reverse": Reverse,
        "central-difference": lambda: CentralDifference(radius=radius),
    }
    return routes[settings.route]()


def _linear_solver(settings: ImplicitOptions) -> LinearSolver:
    iterations, damping = settings.solver_iterations, settings.damping
    solvers: Mapping[str, Callable[[], LinearSolver]] = {
        "nystrom": lambda: Nystrom(iterations, damping),
        "cg": lambda: ConjugateGradient(iterations, damping=damping),
        "neumann": lambda: Neumann(iterations, damping=damping),
    }
    return solvers[settings.linear_solver]()
