"""From options to the pieces of a run: bound, weighting, optimizers, solver."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

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
from recipes.options.groups import (
    DomainOptions,
    ImplicitOptions,
    LearnedOptions,
    NetOptions,
    NoWeighting,
    OneStepOptions,
    PenaltyOptions,
    TableOptions,
    UnrolledOptions,
)
from recipes.options.train import LowerOptions, TrainOptions
from recipes.options.values import OptionError
from recipes.train.hypergradients import differentiated_steps, make_hypergradient
from recipes.train.objective import Objective
from recipes.train.time_scale import TimeScale, distance_to_lower_bound, match_time_scale
from weighting import (
    Bound,
    Clip,
    DomainTable,
    InstanceNet,
    InstanceTable,
    LeakyReLU,
    Sigmoid,
    Softplus,
    Unbounded,
    Weighting,
    feature_count,
)


@contextmanager
def _said_by(options: str) -> Iterator[None]:
    """Turn what a constructor refuses into an ``OptionError`` that names the options behind it."""
    try:
        yield
    except OptionError:
        raise
    except ValueError as error:
        raise OptionError(f"{options}: {error}") from error


def make_bound(settings: LearnedOptions) -> Bound:
    """The bound that the options of a weighting name."""
    low, high = settings.bound_low, settings.bound_high
    bounds: Mapping[str, Callable[[], Bound]] = {
        "clip": lambda: Clip(low, high),
        "clamp": lambda: Clip(low, high, recover=False),
        "sigmoid": lambda: Sigmoid(high),
        "softplus": Softplus,
        "leaky-relu": LeakyReLU,
        "relu": lambda: LeakyReLU(0.0),
        "none": Unbounded,
    }
    return bounds[settings.bound]()


def make_weighting(options: TrainOptions, instances: int, domains: int) -> Weighting | None:
    """The weighting that the options name; None for "none".

    Raises:
        OptionError: Options that do not go together.
    """
    settings = options.weighting
    if isinstance(settings, NoWeighting):
        return None
    with _said_by(f"--weighting {settings.kind}"):
        bound = make_bound(settings)
        match settings:
            case TableOptions():
                _check_batches(options)
                return InstanceTable(instances, settings.prior, bound, settings.normalise)
            case DomainOptions():
                if not float(bound(torch.zeros(()))) > 0:
                    raise ValueError(
                        f"domain weights start at bound(0), which is 0 for --bound "
                        f"{settings.bound}; use softplus or sigmoid"
                    )
                return DomainTable(domains, bound)
            case NetOptions():
                _check_batches(options)
                return InstanceNet(
                    _net_inputs(settings, domains),
                    settings.hidden,
                    settings.layers,
                    settings.prior,
                    bound,
                    centre=settings.centre,
                    normalise=settings.normalise == "batch",
                )


def _net_inputs(settings: NetOptions, domains: int) -> int:
    with _said_by("--features"):
        return feature_count(
            settings.features, reference=settings.reference_features, domains=domains
        )


def _check_batches(options: TrainOptions) -> None:
    settings = options.weighting
    net = isinstance(settings, NetOptions)
    compared = settings.normalise == "batch" or (
        isinstance(settings, NetOptions) and settings.centre
    )
    if options.lower.batch_size == 1 and compared:
        apart = "--normalise none --no-centre" if net else "--normalise table"
        remedy = f"use 2 or more, or {apart}"
        raise ValueError(
            "weights are compared within a micro-batch, and the only example of --batch-size 1 "
            f"always gets the same weight; {remedy}"
        )


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
    with _said_by("--lower-lr, --lower-warmup, --lower-gamma"):
        return _schedule(
            options.lower.schedule,
            options.lower.lr,
            max(1, options.lower.steps),
            warmup=options.lower.warmup,
            drops=(options.lower.step_size, options.lower.gamma),
        )


def lower_optimizer(options: LowerOptions) -> AdamW:
    """AdamW of the lower level."""
    with _said_by("--lower-betas, --lower-max-norm"):
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
    with _said_by("--upper-lr, --upper-warmup, --upper-gamma"):
        return _schedule(
            options.upper.schedule,
            peak,
            max(1, upper_steps(options)),
            warmup=options.upper.warmup,
            drops=(options.upper.step_size, options.upper.gamma),
        )


def time_scale(options: TrainOptions, weighting: Weighting) -> TimeScale:
    """How far the weights can travel in this run.

    Raises:
        OptionError: ``upper_lr`` is neither "auto" nor a number, or weight 1, where a domain's
            weight counts as starting, is outside the bound.
    """
    if options.upper.lr == "auto":
        given = None
    else:
        try:
            given = float(options.upper.lr)
        except ValueError as error:
            raise OptionError(
                f"--upper-lr: expected auto or a number, found {options.upper.lr!r}"
            ) from error
    rows = weighting.size if isinstance(weighting, InstanceTable) else 1
    per_step = options.lower.batch_size * options.lower.accumulation * differentiated_steps(options)
    settings = options.weighting
    assert not isinstance(settings, NoWeighting)
    with _said_by(f"--bound {settings.bound}"):
        bound = weighting.bound
        to_bound = distance_to_lower_bound(bound.range, bound.raw, settings.prior)
    return match_time_scale(
        upper_lr=given,
        upper_steps=upper_steps(options),
        rows=rows,
        rows_per_step=min(rows, per_step),
        to_bound=to_bound,
        schedule_of=lambda peak: upper_schedule(options, peak),
        optimizer=options.upper.optimizer,
        betas=options.upper.betas,
    )


def upper_optimizer(options: TrainOptions, peak: float) -> Any:
    """Optimizer of the upper level."""
    schedule = upper_schedule(options, peak)
    with _said_by("--upper-betas, --upper-max-norm"):
        if options.upper.optimizer == "sgd":
            return SGD(schedule, max_norm=options.upper.max_norm)
        kind = LazyRowAdam if options.upper.optimizer == "lazy-adam" else AdamW
        return kind(
            schedule,
            betas=options.upper.betas,
            weight_decay=options.upper.weight_decay,
            max_norm=options.upper.max_norm,
        )


def make_plain_solver(options: LowerOptions, problem: Problem) -> BilevelSolver:
    """A solver that only ever takes lower steps."""
    return BilevelSolver(
        problem, lower_optimizer(options), SGD(0.0), accumulation=options.lower.accumulation
    )


def make_solver(options: TrainOptions, objective: Objective, upper_peak: float) -> BilevelSolver:
    """The bilevel solver of a run.

    Raises:
        OptionError: a route that does not go with the order or the weighting.
    """
    upper = upper_optimizer(options, upper_peak)
    if isinstance(objective.weighting, InstanceTable):
        # A row that overshoots the clip must not have to travel back before its weight moves.
        upper = Projected(upper, objective.weighting.project)
    with _said_by(_names(options)):
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


def _names(options: TrainOptions) -> str:
    """The options that decide on the hypergradient, as they are."""
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
