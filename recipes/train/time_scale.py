"""Time-scale matching: can the weights travel far enough, and not too far, in this run?

A weight moves only when its instance is visited, by an amount that the upper optimizer decides and
not the size of the hypergradient: Adam divides that out. So how far a weight can travel is known
before the run. This module simulates it: one row of the table, visited regularly, whose
hypergradient always has the same sign, under the real optimizer rule and schedule. Dense Adam moves
a row on for many steps after its visit (its momentum decays, and so does its second moment); lazy
Adam only on the visit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

REACH_OF_THE_BOUND = 1.0
_TOO_SHORT, _TOO_LONG = 0.25, 8.0
_SIGMOID_EDGE = 0.05  # a sigmoid never reaches its end: this share of the scale counts as there


@dataclass(frozen=True)
class TimeScale:
    """What one run can do to its weights.

    Attributes:
        upper_steps: upper-level steps in the run.
        visits: how often each instance is seen by an upper step, on average.
        per_visit: movement of a raw weight per visit, at the given learning rate, averaged over
            the run (schedule included).
        reachable: distance a raw weight can travel if every visit pulls it the same way.
        to_bound: raw distance from the prior to the lower end of the bound; inf if there is none.
        upper_lr: the learning rate that was used.
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


def row_travel(
    upper_steps: int,
    visit_every: float,
    schedule: Callable[[int], float],
    *,
    optimizer: str,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> float:
    """Distance travelled by one row whose hypergradient is 1 on every visit and 0 otherwise.

    Args:
        upper_steps: steps of the upper optimizer.
        visit_every: upper steps between two visits of the row (1: every step).
        schedule: learning rate of each upper step.
        optimizer: "adam" (dense), "lazy-adam" (moves on visits only) or "sgd".
        betas: decay rates of Adam's moments.
        eps: Adam's epsilon.
    """
    first = second = travelled = 0.0
    due, lazy_count = 0.0, 0
    for step in range(upper_steps):
        visited = step >= due
        if visited:
            due += visit_every
        gradient = 1.0 if visited else 0.0
        lr = schedule(step)
        if optimizer == "sgd":
            travelled += lr * gradient
            continue
        if optimizer == "lazy-adam" and not visited:
            continue
        lazy_count += 1
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        mean = first / (1 - betas[0] ** lazy_count)
        scale = math.sqrt(second / (1 - betas[1] ** lazy_count))
        travelled += lr * mean / (scale + eps)
    return travelled


def match_time_scale(
    *,
    upper_lr: float | None,
    upper_steps: int,
    rows: int,
    rows_per_step: int,
    to_bound: float,
    schedule_of: Callable[[float], Callable[[int], float]],
    optimizer: str,
    betas: tuple[float, float],
) -> TimeScale:
    """The time scale of a run; with ``upper_lr=None`` its learning rate is solved for.

    Travel is proportional to the learning rate, so the solution is exact: the rate at which a
    consistently bad instance just reaches the lower end of the bound within the run.

    Args:
        upper_lr: peak learning rate of the upper level, or None to solve for it.
        upper_steps: upper-level steps in the run.
        rows: instances (or domains; 1 for the parameters of a network, which every step visits).
        rows_per_step: instances that one upper step sees.
        to_bound: raw distance from the prior to the lower end of the bound.
        schedule_of: learning-rate schedule for a given peak.
        optimizer: see ``row_travel``.
        betas: decay rates of Adam's moments.
    """
    visit_every = max(1.0, rows / rows_per_step)
    unit = row_travel(upper_steps, visit_every, schedule_of(1.0), optimizer=optimizer, betas=betas)
    visits = upper_steps / visit_every
    if upper_lr is None:
        target = to_bound if math.isfinite(to_bound) else 1.0
        upper_lr = REACH_OF_THE_BOUND * target / unit if unit > 0 else 0.0
    reachable = unit * upper_lr
    return TimeScale(
        upper_steps=upper_steps,
        visits=visits,
        per_visit=reachable / visits if visits else 0.0,
        reachable=reachable,
        to_bound=to_bound,
        upper_lr=upper_lr,
    )


def distance_to_lower_bound(
    bound_range: tuple[float, float], raw: Callable[[float], float], prior: float = 1.0
) -> float:
    """Raw distance from the prior weight to the lower end of a bound.

    An end that no raw weight reaches counts as reached 5 % of the width before it.
    """
    lo, hi = bound_range
    if math.isinf(lo):
        return math.inf
    try:
        return raw(prior) - raw(lo)
    except ValueError:
        width = hi - lo if math.isfinite(hi) else 2.0
        return raw(prior) - raw(lo + _SIGMOID_EDGE * width)
