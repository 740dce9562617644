"""Time-scale matching, one of the three devices that keep instance reweighting stable.

Weights should travel far enough in a run, but not too far. A weight moves only when its instance is
visited, by an amount that depends on the upper optimizer and not on the size of the hypergradient,
which Adam divides out. So the distance that a raw weight can travel is known before the run:

    reachable = Σ over upper steps k of  lr_k · (step of the optimizer at gradient 1 on a visit)

This module simulates one row of the table under the optimizer and schedule of the run. The row is
visited regularly, and its hypergradient always has the same sign. Dense Adam keeps moving a row for
many steps after its visit, while its moments decay: 28 learning rates per visit after the first
visits. Lazy Adam moves it on the visit alone, by one learning rate.

The rows of learned labels are the labels of an example, and the distance is the way from one label
to the other: a consistently bad label is just turned over.

A network moves the weights of all examples with every parameter, so its travel is that of a
simulated run on features of the run's own examples (``weighting.travel``).

``--upper-lr auto`` solves ``reachable = distance to the lower end of the bound``: a consistently
bad example just reaches the lower end, for example weight 0, within the run. A learning rate that
the user gives causes a warning if weights would hardly move, or would be driven into the bound.
There are warnings, too, if rows are hardly ever visited, if the run is too short to train on every
example, and if much of it has the learning rate 0 of a warm-up's first step.
DreamPRM-1.5 (arXiv 2509.05542) sets its rates by hand so that both levels move on one time scale.
``recipes.train.training`` prints the figures before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import takewhile

from recipes.method.hypergradients import differentiated_steps
from recipes.method.make_solver import lower_schedule, upper_schedule, upper_steps
from recipes.options.choices import NoWeighting
from recipes.options.train import TrainOptions
from recipes.options.values import OptionError, blaming
from weighting import Bound, NetTravel, StepLabels, Weighting

REACH_OF_THE_BOUND = 1.0
_TOO_SHORT, _TOO_LONG = 0.25, 8.0
_FEW_VISITS = 5.0  # of a row: fewer hypergradients than that are mostly noise
_IDLE_SHARE = 0.05  # of the steps of a level, at which the learning rate is 0
_SIGMOID_EDGE = 0.05  # share of the width: a sigmoid this close to an end is at it


@dataclass(frozen=True)
class TimeScale:
    """How far a run can move its weights.

    Attributes:
        upper_steps: The number of upper steps of the run.
        visits: How often upper steps visit a parameter of the weighting, on average: a row of
            instances on some of them, all other parameters on each.
        per_visit: The movement of a raw weight per visit, averaged over the run and its schedule.
        reachable: The distance that a raw weight can travel if all visits move it the same way.
        to_bound: The raw distance from the prior to the lower end of the bound, inf without one.
        upper_lr: The peak learning rate of the upper level.
        trained: How often the lower level trains on an example, on average; None: not known.
        shortcomings: Sentences on a run that is too short.
        by_noise: The distance that the raw weights of a network travel if every upper step pushes
            them another way; None for tables.
        in_a_step: The distance that they travel in one upper step at the peak rate; likewise.
    """

    upper_steps: int
    visits: float
    per_visit: float
    reachable: float
    to_bound: float
    upper_lr: float
    trained: float | None = None
    shortcomings: tuple[str, ...] = ()
    by_noise: float | None = None
    in_a_step: float | None = None

    def warnings(self) -> list[str]:
        """Return what is wrong with the run: too short, or weights travel too little or too far."""
        if self.upper_steps == 0:
            return ["no upper step is ever taken: lower --upper-start or raise --steps"]
        found = [*self.shortcomings]
        if self.reachable < _TOO_SHORT * self.to_bound < math.inf:
            found.append(
                f"weights can travel {self.reachable:.2g}, the bound is {self.to_bound:.2g} away: "
                "they will hardly move. Raise --upper-lr (or use auto), train longer, or visit "
                "each instance more often"
            )
        elif self.in_a_step is not None:
            # Pushed one way for a whole run, a network goes far beyond any bound at useful rates.
            if self.in_a_step > self.to_bound:
                found.append(
                    f"one upper step can move weights by {self.in_a_step:.2g}, the bound is only "
                    f"{self.to_bound:.2g} away. Lower --upper-lr (or use auto)"
                )
        elif self.reachable > _TOO_LONG * self.to_bound:
            found.append(
                f"weights can travel {self.reachable:.2g}, the bound is only {self.to_bound:.2g} "
                "away: noise alone will slam them into it. Lower --upper-lr (or use auto)"
            )
        return found

    def table(self) -> str:
        """Return the figures, one on each line."""
        rows = [
            ("upper steps", f"{self.upper_steps}"),
            ("visits per parameter", f"{self.visits:.1f}"),
            ("upper learning rate", f"{self.upper_lr:.4g}"),
            ("movement per visit", f"{self.per_visit:.3g}"),
            ("reachable distance", f"{self.reachable:.3g}"),
            ("distance to the lower bound", f"{self.to_bound:.3g}"),
        ]
        if self.trained is not None:
            rows.insert(1, ("passes over the examples", f"{self.trained:.2f}"))
        if self.by_noise is not None:
            rows.insert(-1, ("distance by noise alone", f"{self.by_noise:.3g}"))
        return "\n".join(f"  {name:<28}{value:>10}" for name, value in rows)


@dataclass(frozen=True)
class UpperMovement:
    """The settings of the upper level that move the weights.

    Attributes:
        steps: The number of upper steps of the run.
        schedule: The learning rate of each upper step, as a share of the peak.
        optimizer: "adam" (dense), "lazy-adam" (moves a row on its visits only) or "sgd".
        betas: The decay rates of Adam's moments.
        eps: The epsilon of Adam.
        visit_every: The number of upper steps from one visit of a row to the next.
    """

    steps: int
    schedule: Callable[[int], float]
    optimizer: str
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    visit_every: float = 1.0


def row_travel(upper: UpperMovement) -> float:
    """Return the distance that one row travels, in peak learning rates.

    Its hypergradient is 1 on every visit and 0 otherwise.
    """
    first = second = travelled = 0.0
    due, updates = 0.0, 0
    for step in range(upper.steps):
        visited = step >= due
        if visited:
            due += upper.visit_every
        gradient = 1.0 if visited else 0.0
        lr = upper.schedule(step)
        if upper.optimizer == "sgd":
            travelled += lr * gradient
            continue
        if upper.optimizer == "lazy-adam" and not visited:
            continue
        updates += 1
        decay, square_decay = upper.betas
        first = decay * first + (1 - decay) * gradient
        second = square_decay * second + (1 - square_decay) * gradient**2
        mean = first / (1 - decay**updates)
        scale = math.sqrt(second / (1 - square_decay**updates))
        travelled += lr * mean / (scale + upper.eps)
    return travelled


def match_time_scale(upper: UpperMovement, to_bound: float, upper_lr: float | None) -> TimeScale:
    """Return the time scale of a run, and solve for its learning rate if ``upper_lr`` is None.

    Travel is proportional to the learning rate, so the solution is exact: the rate at which a
    consistently bad instance just reaches the lower end of the bound within the run.

    Args:
        upper: The settings of the upper level.
        to_bound: The raw distance from the prior to the lower end of the bound. It is inf without
            one, and the learning rate is then solved for a distance of 1.
        upper_lr: The peak learning rate of the upper level, or None to solve for it.
    """
    unit = row_travel(upper)
    if upper_lr is None:
        upper_lr = _target(to_bound) / unit if unit > 0 else 0.0
    return _scale(upper, to_bound, upper_lr, unit * upper_lr)


def match_net(
    travel: NetTravel, upper: UpperMovement, to_bound: float, upper_lr: float | None
) -> TimeScale:
    """Return the time scale of a run with a network: ``match_time_scale`` by a simulated run.

    There is an upper step at least.

    Args:
        travel: The network, its examples and its optimizer.
        upper: The settings of the upper level.
        to_bound: The raw distance from the prior to the lower end of the bound.
        upper_lr: The peak learning rate of the upper level, or None to solve for it.
    """
    if upper_lr is None:
        upper_lr = travel.peak_for(upper.steps, _target(to_bound))
    return replace(
        _scale(upper, to_bound, upper_lr, travel.distance(upper.steps, upper_lr)),
        by_noise=travel.distance(upper.steps, upper_lr, by_noise=True),
        in_a_step=travel.in_a_step(upper_lr),
    )


def _target(to_bound: float) -> float:
    """Return how far weights should be able to travel."""
    return REACH_OF_THE_BOUND * (to_bound if math.isfinite(to_bound) else 1.0)


def _scale(upper: UpperMovement, to_bound: float, upper_lr: float, reachable: float) -> TimeScale:
    visits = upper.steps / upper.visit_every
    return TimeScale(
        upper_steps=upper.steps,
        visits=visits,
        per_visit=reachable / visits if visits else 0.0,
        reachable=reachable,
        to_bound=to_bound,
        upper_lr=upper_lr,
    )


def distance_to_lower_bound(bound: Bound, start: float = 1.0) -> float:
    """Return the raw distance from the initial weight to the lower end of a bound.

    If no raw weight reaches the end, the distance is to the point 5 % of the width before it.

    Args:
        bound: The map from raw weights to weights.
        start: The initial weight of every example.

    Raises:
        ValueError: The initial weight is outside the bound.
    """
    lo, hi = bound.range
    if math.isinf(lo):
        return math.inf
    try:
        return bound.raw(start) - bound.raw(lo)
    except ValueError:
        width = hi - lo if math.isfinite(hi) else 2.0
        return bound.raw(start) - bound.raw(lo + _SIGMOID_EDGE * width)


def time_scale(
    options: TrainOptions,
    weighting: Weighting,
    examples: int,
    travel: Callable[[], NetTravel],
) -> TimeScale:
    """Return how far the weights can travel in this run.

    The row of an instance is visited when its example is in the batches that an upper step
    differentiates through. All other parameters are visited by every upper step.

    Args:
        options: The options of the run.
        weighting: The weighting of the run.
        examples: The number of examples that the lower level trains on.
        travel: A function that runs the model on some of the run's examples, for a weighting
            without rows.

    Raises:
        OptionError: The option ``upper_lr`` is neither "auto" nor a number, or the initial weight
            is outside the bound. Domains start at weight 1.
    """
    drawn = options.lower.batch_size * options.lower.accumulation
    visit_every = 1.0
    if weighting.row_key == "index":
        per_step = drawn * differentiated_steps(options)
        visit_every = max(1.0, weighting.size / min(weighting.size, per_step))
    upper_lr = _given_rate(options)
    settings = options.weighting
    assert not isinstance(settings, NoWeighting)
    with blaming(f"--bound {settings.bound}"):
        to_bound = (
            weighting.turn
            if isinstance(weighting, StepLabels)
            else distance_to_lower_bound(weighting.bound, weighting.start)
        )
    upper = UpperMovement(
        steps=upper_steps(options),
        schedule=upper_schedule(options, 1.0),
        optimizer=options.upper.optimizer,
        betas=options.upper.betas,
        visit_every=visit_every,
    )
    if weighting.row_key is None and upper.steps:
        scale = match_net(travel(), upper, to_bound, upper_lr)
    else:
        scale = match_time_scale(upper, to_bound, upper_lr)
    return replace(
        scale,
        trained=options.lower.steps * drawn / examples,
        shortcomings=tuple(_shortcomings(options, upper, examples / drawn)),
    )


def _shortcomings(
    options: TrainOptions, upper: UpperMovement, steps_of_a_pass: float
) -> Iterator[str]:
    """Yield a sentence for each way in which the run is too short, with the steps that would do."""
    steps = options.lower.steps
    visits = upper.steps / upper.visit_every
    if upper.visit_every > 1.0 and visits < _FEW_VISITS:
        needed = math.ceil(_FEW_VISITS * upper.visit_every) * options.upper.unroll_steps
        yield (
            f"upper steps visit each row {visits:.2g} times: its weight will be noise, or stay at "
            f"the prior. {_FEW_VISITS:.0f} visits take --steps {options.upper.start + needed}, or "
            "larger batches"
        )
    if steps < steps_of_a_pass:
        yield (
            f"{steps} steps train on {steps / steps_of_a_pass:.0%} of the examples, the others "
            f"are never seen: --steps {math.ceil(steps_of_a_pass)} see each of them once"
        )
    levels = (
        ("--lower-warmup", options.lower.warmup, steps, lower_schedule(options)),
        ("--upper-warmup", options.upper.warmup, upper.steps, upper.schedule),
    )
    for flag, warmup, count, schedule in levels:
        rates = (schedule(step) for step in range(count if warmup else 0))
        idle = len([*takewhile(lambda rate: rate == 0.0, rates)])
        if idle and idle >= _IDLE_SHARE * count:
            enough = math.floor(idle / _IDLE_SHARE) + 1
            yield (
                f"{flag}: the learning rate of the first {idle} of {count} steps is 0; set "
                f"{flag} 0, or take {enough} steps, of which that is less than {_IDLE_SHARE:.0%}"
            )


def print_time_scale(scale: TimeScale) -> None:
    """Print the figures before a run, with a line for each warning."""
    print("time scale\n" + scale.table())
    for warning in scale.warnings():
        print(f"warning: {warning}")


def _given_rate(options: TrainOptions) -> float | None:
    """Return the number that ``--upper-lr`` gives, or None for "auto"."""
    if options.upper.lr == "auto":
        return None
    try:
        return float(options.upper.lr)
    except ValueError as error:
        raise OptionError(
            f"--upper-lr: expected auto or a number, found {options.upper.lr!r}"
        ) from error
