"""From options to the solver of a run: schedules, the optimizers of both levels, the solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bilevel import (
    SGD,
    AdamW,
    BilevelSolver,
    LazyRowAdam,
    Projected,
    WarmupCosine,
)
from bilevel.optimizers.schedule import Constant, StepDecay
from bilevel.problem import Problem
from recipes.options.choices import ImplicitOptions, OneStepOptions, PenaltyOptions, UnrolledOptions
from recipes.options.train import LowerOptions, TrainOptions
from recipes.options.values import blaming
from recipes.train.hypergradients import make_hypergradient
from recipes.train.objective import Objective, Solver


def _schedule(
    kind: str, peak: float, steps: int, *, warmup: float, drops: tuple[int, float]
) -> Callable[[Any], Any]:
    if kind == "constant":
        return Constant(peak)
    if kind == "step":
        return StepDecay(peak, *drops)
    return WarmupCosine(peak, round(warmup * steps), steps)


def lower_schedule(options: LowerOptions) -> Callable[[Any], Any]:
    """Learning rate of every lower step."""
    with blaming("--lower-lr, --lower-warmup, --lower-gamma"):
        return _schedule(
            options.lower.schedule,
            options.lower.lr,
            max(1, options.lower.steps),
            warmup=options.lower.warmup,
            drops=(options.lower.step_size, options.lower.gamma),
        )


def lower_optimizer(options: LowerOptions) -> AdamW:
    """AdamW of the lower level."""
    with blaming("--lower-betas, --lower-max-norm"):
        return AdamW(
            lower_schedule(options),
            betas=options.lower.betas,
            weight_decay=options.lower.weight_decay,
            max_norm=options.lower.max_norm,
        )


def upper_steps(options: TrainOptions) -> int:
    """How many upper steps the run takes."""
    return max(0, options.lower.steps - options.upper.start) // options.upper.unroll_steps


def upper_schedule(options: TrainOptions, peak: float) -> Callable[[Any], Any]:
    """Learning rate of every upper step."""
    with blaming("--upper-lr, --upper-warmup, --upper-gamma"):
        return _schedule(
            options.upper.schedule,
            peak,
            max(1, upper_steps(options)),
            warmup=options.upper.warmup,
            drops=(options.upper.step_size, options.upper.gamma),
        )


def logged_upper_rate(options: TrainOptions, peak: float) -> Callable[[int], float]:
    """Learning rate of the upper step that a lower step belongs to, by its number, for the log."""
    schedule = upper_schedule(options, peak)
    return lambda step: schedule(max(0, step - options.upper.start) // options.upper.unroll_steps)


def upper_optimizer(options: TrainOptions, peak: float) -> Any:
    """Optimizer of the upper level."""
    schedule = upper_schedule(options, peak)
    with blaming("--upper-betas, --upper-max-norm"):
        if options.upper.optimizer == "sgd":
            return SGD(schedule, max_norm=options.upper.max_norm)
        kind = LazyRowAdam if options.upper.optimizer == "lazy-adam" else AdamW
        return kind(
            schedule,
            betas=options.upper.betas,
            weight_decay=options.upper.weight_decay,
            max_norm=options.upper.max_norm,
        )


def make_plain_solver(options: LowerOptions, problem: Problem) -> Solver:
    """A solver that only ever takes lower steps."""
    return BilevelSolver(
        problem, lower_optimizer(options), SGD(0.0), accumulation=options.lower.accumulation
    )


def make_solver(options: TrainOptions, objective: Objective, upper_peak: float) -> Solver:
    """The bilevel solver of a run.

    Args:
        options: Options of the run.
        objective: The two losses, with a weighting.
        upper_peak: Peak learning rate of the upper level.

    Raises:
        OptionError: A route that does not go with the order or the weighting.
    """
    assert objective.weighting is not None
    # A row that overshoots a bound must not have to travel back before its weight moves.
    upper = Projected(upper_optimizer(options, upper_peak), objective.weighting.project)
    with blaming(_flags(options)):
        return BilevelSolver(
            objective.problem(),
            lower_optimizer(options),
            upper,
            make_hypergradient(options.hypergradient),
            unroll_steps=options.upper.unroll_steps,
            accumulation=options.lower.accumulation,
            rollback=options.rollback,
            upper_start=options.upper.start,
        )


def _flags(options: TrainOptions) -> str:
    """The options that decide on the hypergradient, with their values."""
    settings = options.hypergradient
    name = f"--hypergradient {settings.kind}"
    match settings:
        case OneStepOptions():
            return f"--route {settings.route}, --order {settings.order}"
        case UnrolledOptions():
            return name
        case ImplicitOptions():
            return f"{name}, --linear-solver {settings.linear_solver}, --damping {settings.damping}"
        case PenaltyOptions():
            return f"{name}, --penalty-strength {settings.penalty_strength}"
