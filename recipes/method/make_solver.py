"""Build the solver of a run from its options: schedules, optimizers, the solver itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from bilevel import (
    SGD,
    AdamW,
    Auto,
    BilevelSolver,
    Collective,
    Dot,
    Jvp,
    LazyRowAdam,
    OneStep,
    Projected,
    Replicas,
    ResidentSolver,
    ShardedModule,
    Shards,
    WarmupCosine,
)
from bilevel.optimizers.schedule import Constant, StepDecay
from bilevel.problem import Problem, is_separable
from bilevel.resident.scope import outside
from prm.models.model import PRM
from recipes.method.hypergradients import make_hypergradient
from recipes.method.objective import Objective, Solver, State
from recipes.options.choices import ImplicitOptions, OneStepOptions, PenaltyOptions, UnrolledOptions
from recipes.options.train import LowerOptions, TrainOptions
from recipes.options.values import OptionError, blaming
from recipes.ranks import several_ranks, share

RESIDENT_FROM = 100_000_000
"""Trained parameters from which on ``--execution auto`` takes steps in place.

Smaller models have the memory, and their runs keep the bits of the functional step.
"""


def _schedule(
    kind: str, peak: float, steps: int, *, warmup: float, drops: tuple[int, float]
) -> Callable[[Any], Any]:
    if kind == "constant":
        return Constant(peak)
    if kind == "step":
        return StepDecay(peak, *drops)
    return WarmupCosine(peak, round(warmup * steps), steps)


def lower_schedule(options: LowerOptions) -> Callable[[Any], Any]:
    """Return the learning rate of every lower step."""
    with blaming("--lower-lr, --lower-warmup, --lower-gamma"):
        return _schedule(
            options.lower.schedule,
            options.lower.lr,
            max(1, options.lower.steps),
            warmup=options.lower.warmup,
            drops=(options.lower.step_size, options.lower.gamma),
        )


def lower_optimizer(options: LowerOptions) -> AdamW:
    """Return the AdamW of the lower level."""
    with blaming("--lower-betas, --lower-max-norm"):
        return AdamW(
            lower_schedule(options),
            betas=options.lower.betas,
            weight_decay=options.lower.weight_decay,
            max_norm=options.lower.max_norm,
        )


def upper_steps(options: TrainOptions) -> int:
    """Return the number of upper steps of the run."""
    return max(0, options.lower.steps - options.upper.start) // options.upper.unroll_steps


def upper_schedule(options: TrainOptions, peak: float) -> Callable[[Any], Any]:
    """Return the learning rate of every upper step."""
    with blaming("--upper-lr, --upper-warmup, --upper-gamma"):
        return _schedule(
            options.upper.schedule,
            peak,
            max(1, upper_steps(options)),
            warmup=options.upper.warmup,
            drops=(options.upper.step_size, options.upper.gamma),
        )


def logged_upper_rate(options: TrainOptions, peak: float) -> Callable[[int], float]:
    """Return the learning rate of the upper step that a lower step belongs to, for the log."""
    schedule = upper_schedule(options, peak)
    return lambda step: schedule(max(0, step - options.upper.start) // options.upper.unroll_steps)


def upper_optimizer(options: TrainOptions, peak: float) -> Any:
    """Return the optimizer of the upper level."""
    return scheduled_upper_optimizer(options, upper_schedule(options, peak))


def scheduled_upper_optimizer(options: TrainOptions, schedule: Callable[[Any], Any]) -> Any:
    """Return the optimizer of the upper level, with another schedule in place of its own."""
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


def make_plain_solver(options: LowerOptions, problem: Problem, trained: int = 0) -> Solver:
    """Return a solver that takes lower steps only, of a model with so many trained parameters."""
    # There is no product: a route whose pass is autograd's own, in the order of a step in place.
    solver = BilevelSolver(
        problem,
        lower_optimizer(options),
        SGD(0.0),
        OneStep(Jvp(), "upper-first"),
        accumulation=options.lower.accumulation,
    )
    return _executed(options, solver, trained)


def make_solver(
    options: TrainOptions, objective: Objective, upper_peak: float, trained: int = 0
) -> Solver:
    """Return the bilevel solver of a run.

    Args:
        options: The options of the run.
        objective: The losses of both levels, with a weighting.
        upper_peak: The peak learning rate of the upper level.
        trained: The number of trained parameters of the model.

    Raises:
        OptionError: The route contradicts the order or the weighting, or a step in place is wanted
            and something else that it does not do.
    """
    assert objective.weighting is not None
    # A row beyond a bound would first have to travel back before its weight moves.
    upper = Projected(upper_optimizer(options, upper_peak), objective.weighting.project)
    with blaming(_flags(options)):
        solver = BilevelSolver(
            objective.problem(),
            lower_optimizer(options),
            upper,
            make_hypergradient(options.hypergradient),
            unroll_steps=options.upper.unroll_steps,
            accumulation=options.lower.accumulation,
            rollback=options.rollback,
            upper_start=options.upper.start,
        )
    return _executed(options, solver, trained)


def _executed(options: LowerOptions, solver: Solver, trained: int) -> Solver:
    """Return the solver in the execution that is chosen.

    Raises:
        OptionError: It asks for something that a step in place does not do.
    """
    chosen, method = options.lower.execution, solver.hypergradient
    in_shards = options.sharding != "none"
    if chosen == "functional" or (chosen == "auto" and trained < RESIDENT_FROM and not in_shards):
        return solver
    wanted = {field.name: getattr(solver, field.name) for field in fields(solver)}
    # Auto comes to the same for single examples.
    if in_shards and isinstance(method, OneStep):
        wanted["hypergradient"] = replace(method, route=Dot())
    elif (
        options.lower.batch_size == 1 and method == OneStep(Auto()) and is_separable(solver.problem)
    ):
        wanted["hypergradient"] = OneStep(Dot())
    for found in _not_in_place(replace(solver, **wanted)):
        if chosen == "auto":
            return solver
        raise OptionError(
            f"--execution resident: {found} cannot be done in place; use --execution functional"
        )
    return ResidentSolver(**wanted)


def _not_in_place(solver: Solver) -> Iterator[str]:
    """Yield each thing that a step in place does not do, of one process or of several."""
    yield from (found for found, _ in outside(solver))
    method = solver.hypergradient
    if several_ranks() and isinstance(method, OneStep) and method.order == "lower-first":
        yield "order lower-first over several ranks"


def begin(solver: Solver, prm: PRM, lower: dict[str, Tensor], upper: dict[str, Tensor]) -> State:
    """Return the state before the first step.

    Of a resident solver θ is the model's own memory from now on, and there is no other copy of it.
    """
    if isinstance(solver, ResidentSolver) and prm.spread is None:
        for name, leaf in lower.items():
            prm.model.get_parameter(name).data = leaf
    return solver.init(lower, upper)


def over_ranks(
    solver: Solver,
    ranks: Collective,
    upper_size: Callable[[Any], int],
    shards: ShardedModule | None = None,
) -> Solver:
    """Return the solver of a rank, which takes its share of the micro-batches of a step.

    Args:
        solver: The solver of one process.
        ranks: The ranks of the run.
        upper_size: The number of terms in the mean of the meta loss, for a part of a meta batch.
        shards: The parts of the model, if it is spread over the ranks.

    Raises:
        OptionError: A rank would have no micro-batch, or the hypergradient does not run on several.
    """
    if shards is not None:
        part = share(solver.accumulation, ranks.rank, ranks.ranks)
        collective: Collective = Shards(shards, upper_size)
        return replace(solver, accumulation=len(part), collective=collective)
    if not isinstance(ranks, Replicas):
        return solver
    here, count = solver.accumulation, ranks.ranks
    if here < count:
        raise OptionError(
            f"--accumulation {here}: {count} processes need a micro-batch each per lower step; "
            f"give --accumulation {count} (and a --batch-size of 1/{count} for as many examples "
            "per step), or start fewer processes"
        )
    with blaming("--hypergradient"):
        return replace(
            solver,
            accumulation=len(share(here, ranks.rank, count)),
            collective=replace(ranks, upper_size=upper_size),
        )


def _flags(options: TrainOptions) -> str:
    """Return the options that choose the hypergradient, with their values."""
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
