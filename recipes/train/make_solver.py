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
from recipes.options.train import LowerOptions, OptionError, TrainOptions
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


def make_bound(options: TrainOptions) -> Bound:
    """The bound that the options name."""
    bounds: Mapping[str, Callable[[], Bound]] = {
        "clip": lambda: Clip(options.bound_low, options.bound_high),
        "clamp": lambda: Clip(options.bound_low, options.bound_high, recover=False),
        "sigmoid": lambda: Sigmoid(options.bound_high),
        "softplus": Softplus,
        "leaky-relu": LeakyReLU,
        "relu": lambda: LeakyReLU(0.0),
        "none": Unbounded,
    }
    return bounds[options.bound]()


def make_weighting(options: TrainOptions, instances: int, domains: int) -> Weighting | None:
    """The weighting that the options name; None for "none".

    Raises:
        OptionError: options that do not go together.
    """
    with _said_by(f"--weighting {options.weighting}"):
        bound = make_bound(options)
        if options.weighting == "table":
            _check_batches(options)
            return InstanceTable(instances, options.prior, bound, options.normalise)
        if options.weighting == "domain":
            if not float(bound(torch.zeros(()))) > 0:
                raise ValueError(
                    f"domain weights start at bound(0), which is 0 for --bound {options.bound}; "
                    "use softplus or sigmoid"
                )
            return DomainTable(domains, bound)
        if options.weighting == "net":
            _check_batches(options)
            return InstanceNet(
                _net_inputs(options, domains),
                options.hidden,
                options.layers,
                options.prior,
                bound,
                centre=options.centre,
                normalise=options.normalise == "batch",
            )
    return None


def _net_inputs(options: TrainOptions, domains: int) -> int:
    with _said_by("--features"):
        return feature_count(
            options.features, reference=options.reference_features, domains=domains
        )


def _check_batches(options: TrainOptions) -> None:
    net = options.weighting == "net"
    if options.batch_size == 1 and ((net and options.centre) or options.normalise == "batch"):
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
            options.lower_schedule,
            options.lower_lr,
            max(1, options.steps),
            warmup=options.lower_warmup,
            drops=(options.lower_step_size, options.lower_gamma),
        )


def lower_optimizer(options: LowerOptions) -> AdamW:
    """AdamW of the lower level."""
    with _said_by("--lower-betas, --lower-max-norm"):
        return AdamW(
            lower_schedule(options),
            betas=options.lower_betas,
            weight_decay=options.lower_weight_decay,
            max_norm=options.lower_max_norm,
        )


def upper_steps(options: TrainOptions) -> int:
    """How many upper steps the run takes."""
    return max(0, options.steps - options.upper_start) // options.unroll_steps


def upper_schedule(options: TrainOptions, peak: float) -> Callable[[Any], Any]:
    """Learning rate of every upper step."""
    with _said_by("--upper-lr, --upper-warmup, --upper-gamma"):
        return _schedule(
            options.upper_schedule,
            peak,
            max(1, upper_steps(options)),
            warmup=options.upper_warmup,
            drops=(options.upper_step_size, options.upper_gamma),
        )


def time_scale(options: TrainOptions, weighting: Weighting) -> TimeScale:
    """How far the weights can travel in this run.

    Raises:
        OptionError: ``upper_lr`` is neither "auto" nor a number, or weight 1, where a domain's
            weight counts as starting, is outside the bound.
    """
    if options.upper_lr == "auto":
        given = None
    else:
        try:
            given = float(options.upper_lr)
        except ValueError as error:
            raise OptionError(
                f"--upper-lr: expected auto or a number, found {options.upper_lr!r}"
            ) from error
    rows = weighting.size if isinstance(weighting, InstanceTable) else 1
    per_step = options.batch_size * options.accumulation * differentiated_steps(options)
    start = 1.0 if isinstance(weighting, DomainTable) else options.prior
    with _said_by(f"--bound {options.bound}"):
        to_bound = distance_to_lower_bound(weighting.bound.range, weighting.bound.raw, start)
    return match_time_scale(
        upper_lr=given,
        upper_steps=upper_steps(options),
        rows=rows,
        rows_per_step=min(rows, per_step),
        to_bound=to_bound,
        schedule_of=lambda peak: upper_schedule(options, peak),
        optimizer=options.upper_optimizer,
        betas=options.upper_betas,
    )


def upper_optimizer(options: TrainOptions, peak: float) -> Any:
    """Optimizer of the upper level."""
    schedule = upper_schedule(options, peak)
    with _said_by("--upper-betas, --upper-max-norm"):
        if options.upper_optimizer == "sgd":
            return SGD(schedule, max_norm=options.upper_max_norm)
        kind = LazyRowAdam if options.upper_optimizer == "lazy-adam" else AdamW
        return kind(
            schedule,
            betas=options.upper_betas,
            weight_decay=options.upper_weight_decay,
            max_norm=options.upper_max_norm,
        )


def make_plain_solver(options: LowerOptions, problem: Problem) -> BilevelSolver:
    """A solver that only ever takes lower steps."""
    return BilevelSolver(
        problem, lower_optimizer(options), SGD(0.0), accumulation=options.accumulation
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
            make_hypergradient(options),
            unroll_steps=options.unroll_steps,
            accumulation=options.accumulation,
            rollback=options.rollback,
            upper_start=options.upper_start,
        )


def _names(options: TrainOptions) -> str:
    """The options that decide on the hypergradient, as they are."""
    if options.hypergradient == "one-step":
        return f"--route {options.route}, --order {options.order}"
    name = f"--hypergradient {options.hypergradient}"
    if options.hypergradient == "implicit":
        return f"{name}, --linear-solver {options.linear_solver}, --damping {options.damping}"
    if options.hypergradient == "penalty":
        return f"{name}, --penalty-strength {options.penalty_strength}"
    return name
