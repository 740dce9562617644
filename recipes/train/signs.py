"""Signs, in the log of a run, that its method does not do what it should.

No single step shows them: an upper loss that does not fall, weights that stand at their bounds
early, a model whose scores leave the outcomes behind. Losses and scores are compared between the
first and the last third of the upper steps so far, with the scatter of their lines as the error.
Each sign is told once, at a quarter, a half, three quarters or the end of the run.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

_FEWEST_LINES = 6  # of upper steps, below which nothing is said
_EARLY = 0.25  # of the steps of a run
_DRIFT = 0.15  # of mean score from the share of right solutions, beside the start


class Sign(NamedTuple):
    """A sign: the name under which results have it, and a sentence with figures and remedy."""

    kind: str
    text: str


class Mean(NamedTuple):
    """A mean and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"


def signs(lines: Sequence[Mapping[str, Any]], steps: int) -> list[Sign]:
    """Return the signs in the lines of a log.

    Args:
        lines: The lines of the training phase so far, in order (``recipes.run.step_log``).
        steps: Lower steps of the whole run.
    """
    found = [_upper_loss(lines), _early_bounds(lines, steps), _drift(lines)]
    return [sign for sign in found if sign is not None]


def _upper_loss(lines: Sequence[Mapping[str, Any]]) -> Sign | None:
    """An upper loss that has not fallen by twice the error of the difference."""
    thirds = _thirds([line["upper_loss"] for line in lines if _has(line, "upper_loss")])
    if thirds is None:
        return None
    first, last = thirds
    if last.value < first.value - 2 * math.hypot(first.error, last.error):
        return None
    return Sign(
        "upper_loss_did_not_fall",
        f"the upper loss did not fall beyond its scatter: {first} in the first third of the upper "
        f"steps, {last} in the last. The weights then follow noise, or a model that needs no "
        "weights: compare with --weighting none, use larger meta batches or more steps",
    )


def _early_bounds(lines: Sequence[Mapping[str, Any]], steps: int) -> Sign | None:
    """All weights of a step at an end of their bound, in the first quarter of the run."""
    early = [line for line in lines if line["step"] <= _EARLY * steps]
    count = sum(line.get("troubles", {}).get("weights_at_bound", 0) for line in early)
    if not count:
        return None
    return Sign(
        "weights_at_bound_early",
        f"all weights stood at an end of their bound after {count} upper steps of the first "
        f"{_EARLY:.0%} of the run, where few examples were seen more than once; lower --upper-lr",
    )


def _drift(lines: Sequence[Mapping[str, Any]]) -> Sign | None:
    """Scores that are further from the share of right solutions than at the start."""
    there = [line for line in lines if _has(line, "meta/score") and _has(line, "meta/right")]
    thirds = _thirds([line["meta/score"] - line["meta/right"] for line in there])
    if thirds is None:
        return None
    first, last = thirds
    error = math.hypot(first.error, last.error)
    if abs(last.value) - abs(first.value) <= max(_DRIFT, 2 * error):
        return None
    return Sign(
        "scores_left_the_outcomes",
        "the mean score of meta solutions minus the share of right ones went from "
        f"{first} to {last}: selection may still work, but a score is no probability any more. "
        "Lower --upper-lr, or take a loss that a shift of all scores cannot lower "
        "(--loss-target both)",
    )


def _has(line: Mapping[str, Any], name: str) -> bool:
    return line.get(name) is not None


def _thirds(values: Sequence[float]) -> tuple[Mean, Mean] | None:
    """Return the means of the first and last third; None if there are too few."""
    size = len(values) // 3
    if len(values) < _FEWEST_LINES:
        return None
    return _mean(values[:size]), _mean(values[-size:])


def _mean(values: Sequence[float]) -> Mean:
    return Mean(statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5)


def log_lines(log: Path, title: str) -> list[Mapping[str, Any]]:
    """Return the lines of a phase of a log; none if it was not begun."""
    if not log.exists():
        return []
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    return [line for line in lines if line["phase"] == title]


def watcher(log: Path, title: str, steps: int) -> Callable[[int, object], None]:
    """Return a function of the step that tells each sign once, at the quarters of the run.

    Args:
        log: The log, which is read then.
        title: The phase whose lines are looked at.
        steps: Lower steps of the whole run.
    """
    told: set[str] = set()
    due = [step for quarter in (1, 2, 3) if (step := quarter * steps // 4)]

    def watch(step: int, _: object) -> None:
        if not due or step < due[0] or step >= steps:
            return
        while due and due[0] <= step:
            due.pop(0)
        for sign in signs(log_lines(log, title), steps):
            if sign.kind not in told:
                tqdm.write(f"{title}, step {step}: {sign.text}", file=sys.stderr)
            told.add(sign.kind)

    return watch
