"""Time-scale matching, one of the three devices that keep instance reweighting stable.

Weights should travel far enough in a run, but not too far. A weight moves only when its instance is
visited, by an amount that depends on the upper optimizer and not on the size of the hypergradient,
which Adam divides out. So the distance that a raw weight can travel is known before the run:

    reachable = Σ over upper steps k of  lr_k · (step of the optimizer at gradient 1 on a visit)

This module simulates one row of the table under the optimizer and schedule of the run. The row is
visited regularly, and its hypergradient always has the same sign. Dense Adam keeps moving a row for
many steps after its visit, while its moments decay: 28 learning rates per visit after the first
visits. Lazy Adam moves it on the visit alone, by one learning rate.

``--upper-lr auto`` solves ``reachable = distance to the lower end of the bound``: a consistently
bad example just reaches the lower end, for example weight 0, within the run. A learning rate that
the user gives causes a warning if weights would hardly move, or would be driven into the bound.
DreamPRM-1.5 (arXiv 2509.05542) sets its rates by hand so that both levels move on one time scale.
``recipes.train.training`` prints the figures before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from recipes.options.choices import NoWeighting
from recipes.options.train import TrainOptions
from recipes.options.values import OptionError, blaming
from recipes.train.hypergradients import differentiated_steps
from recipes.train.make_solver import upper_schedule, upper_steps
from weighting import Bound, Weighting

REACH_OF_THE_BOUND = 1.0
_TOO_SHORT, _TOO_LONG = 0.25, 8.0
_SIGMOID_EDGE = 0.05  # share of the width: a sigmoid this close to an end is at it


@dataclass(frozen=True)
class TimeScale:
    """How far a run can move its weights.

    Attributes:
        upper_steps: The number of upper steps of the run.
        visits: How often upper steps visit each instance, on average.
        per_visit: The movement of a raw weight per visit, averaged over the run and its schedule.
        reachable: The distance that a raw weight can travel if all visits move it the same way.
        to_bound: The raw distance from the prior to the lower end of the bound, inf without one.
        upper_lr: The peak learning rate of the upper level.
    """

    upper_steps: int
    visits: float
    per_visit: float
    reachable: float
    to_bound: float
    upper_lr: float

    def warning(self) -> str | None:
        """Return a warning if the weights can travel too little or too far."""
        if self.upper_steps == 0:
            return "no upper step is ever taken: lower --upper-start or raise --steps"
        if math.isinf(self.to_bound):
            return None
        if self.reachable < _TOO_SHORT * self.to_bound:
            return (
                f"weights can travel {self.reachable:.2g}, the bound is {self.to_bound:.2g} away: "
                "they will hardly move. Raise --upper-lr (or use auto), train longer, or visit "
                "each instance more often"
            )
        if self.reachable > _TOO_LONG * self.to_bound:
            return (
                f"weights can travel {self.reachable:.2g}, the bound is only {self.to_bound:.2g} "
                "away: noise alone will slam them into it. Lower --upper-lr (or use auto)"
            )
        return None

    def table(self) -> str:
        """Return the figures, one on each line."""
        rows = [
            ("upper steps", f"{self.upper_steps}"),
            ("visits per instance", f"{self.visits:.1f}"),
            ("upper learning rate", f"{self.upper_lr:.4g}"),
            ("movement per visit", f"{self.per_visit:.3g}"),
            ("reachable distance", f"{self.reachable:.3g}"),
            ("distance to the lower bound", f"{self.to_bound:.3g}"),
        ]
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
    visits = upper.steps / upper.visit_every
    if upper_lr is None:
        target = to_bound if math.isfinite(to_bound) else 1.0
        upper_lr = REACH_OF_THE_BOUND * target / unit if unit > 0 else 0.0
    reachable = unit * upper_lr
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


def time_scale(options: TrainOptions, weighting: Weighting) -> TimeScale:
    """Return how far the weights can travel in this run.

    The row of an instance is visited when its example is in the batches that an upper step
    differentiates through. All other parameters are visited by every upper step.

    Args:
        options: The options of the run.
        weighting: The weighting of the run.

    Raises:
        OptionError: The option ``upper_lr`` is neither "auto" nor a number, or the initial weight
            is outside the bound. Domains start at weight 1.
    """
    visit_every = 1.0
    if weighting.row_key == "index":
        examples = options.lower.batch_size * options.lower.accumulation
        per_step = examples * differentiated_steps(options)
        visit_every = max(1.0, weighting.size / min(weighting.size, per_step))
    upper_lr = _given_rate(options)
    settings = options.weighting
    assert not isinstance(settings, NoWeighting)
    with blaming(f"--bound {settings.bound}"):
        to_bound = distance_to_lower_bound(weighting.bound, weighting.start)
    upper = UpperMovement(
        steps=upper_steps(options),
        schedule=upper_schedule(options, 1.0),
        optimizer=options.upper.optimizer,
        betas=options.upper.betas,
        visit_every=visit_every,
    )
    return match_time_scale(upper, to_bound, upper_lr)


def print_time_scale(scale: TimeScale) -> None:
    """Print the figures before a run, with the warning if there is one."""
    print("time scale\n" + scale.table())
    if warning := scale.warning():
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
