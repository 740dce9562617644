"""Time-scale matching, one of the three devices that keep instance reweighting stable.

Can the weights travel far enough, and not too far, in this run? A weight moves only when its
instance is visited, by an amount that the upper optimizer decides and not the size of the
hypergradient: Adam divides that out. So how far a raw weight can travel is known before the run:

    reachable = Σ over upper steps k of  lr_k · (step of the optimizer at gradient 1 on a visit)

This module simulates it: one row of the table, visited regularly, whose hypergradient always has
the same sign, under the real optimizer rule and schedule. Dense Adam moves a row on for many steps
after its visit (its momentum decays, and so does its second moment), 28 learning rates a visit once
warm; lazy Adam moves it on the visit alone, one learning rate.

``--upper-lr auto`` solves ``reachable = distance to the lower end of the bound``: a consistently
bad example just reaches weight 0 (or whatever the lower end is) within the run. A learning rate
that is given gets a warning if weights would hardly move, or be slammed into the bound.
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
_SIGMOID_EDGE = 0.05  # a sigmoid never reaches its end: this share of the scale counts as there


@dataclass(frozen=True)
class TimeScale:
    """What one run can do to its weights.

    Attributes:
        upper_steps: Upper-level steps in the run.
        visits: How often each instance is seen by an upper step, on average.
        per_visit: Movement of a raw weight per visit, at the given learning rate, averaged over
            the run (schedule included).
        reachable: Distance a raw weight can travel if every visit pulls it the same way.
        to_bound: Raw distance from the prior to the lower end of the bound; inf if there is none.
        upper_lr: Peak learning rate of the upper level that was used.
    """

    upper_steps: int
    visits: float
    per_visit: float
    reachable: float
    to_bound: float
    upper_lr: float

    def warning(self) -> str | None:
        """What is wrong with these scales, if anything is."""
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
        """The figures, one a line."""
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
class UpperLevel:
    """What moves the weights of a run.

    Attributes:
        steps: Upper-level steps in the run.
        schedule: Learning rate of each upper step, as a share of the peak.
        optimizer: "adam" (dense), "lazy-adam" (moves a row on its visits only) or "sgd".
        betas: Decay rates of Adam's moments.
        eps: Adam's epsilon.
        visit_every: Upper steps between two visits of a row (1: every step).
    """

    steps: int
    schedule: Callable[[int], float]
    optimizer: str
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    visit_every: float = 1.0


def row_travel(upper: UpperLevel) -> float:
    """Distance travelled by one row, in peak learning rates.

    Of a row whose hypergradient is 1 on every visit and 0 otherwise.
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


def match_time_scale(upper: UpperLevel, to_bound: float, upper_lr: float | None) -> TimeScale:
    """The time scale of a run; with ``upper_lr=None`` its learning rate is solved for.

    Travel is proportional to the learning rate, so the solution is exact: the rate at which a
    consistently bad instance just reaches the lower end of the bound within the run.

    Args:
        upper: What moves the weights.
        to_bound: Raw distance from the prior to the lower end of the bound; inf if there is none,
            for which a distance of 1 is solved for.
        upper_lr: Peak learning rate of the upper level, or None to solve for it.
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
    """Raw distance from the weight at the start to the lower end of a bound.

    An end that no raw weight reaches counts as reached 5 % of the width before it.

    Args:
        bound: Map from raw weights to weights.
        start: Weight of every example at the start.

    Raises:
        ValueError: The bound gives no such weight.
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
    """How far the weights can travel in this run.

    A row of an instance is visited when its example is in the batches that an upper step
    differentiates through; every upper step visits all other parameters.

    Args:
        options: Options of the run.
        weighting: The weighting that they name.

    Raises:
        OptionError: ``upper_lr`` is neither "auto" nor a number, or the weight at the start is
            outside the bound (weight 1, for domains).
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
    upper = UpperLevel(
        steps=upper_steps(options),
        schedule=upper_schedule(options, 1.0),
        optimizer=options.upper.optimizer,
        betas=options.upper.betas,
        visit_every=visit_every,
    )
    return match_time_scale(upper, to_bound, upper_lr)


def print_time_scale(scale: TimeScale) -> None:
    """Show the figures before a run, and what is wrong with them."""
    print("time scale\n" + scale.table())
    if warning := scale.warning():
        print(f"warning: {warning}")


def _given_rate(options: TrainOptions) -> float | None:
    """The number that ``--upper-lr`` gives; None for "auto"."""
    if options.upper.lr == "auto":
        return None
    try:
        return float(options.upper.lr)
    except ValueError as error:
        raise OptionError(
            f"--upper-lr: expected auto or a number, found {options.upper.lr!r}"
        ) from error
