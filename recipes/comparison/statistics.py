"""Means over seeds, and what is paired among rows: differences, and the share of a gap closed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recipes.evaluation.table import DEV_STOPPED

_RESAMPLES = 10_000

Values = dict[str, np.ndarray]
"""Row name -> whether the selected candidate of each question is right, [questions]."""


def statistics(per_seed: Sequence[Values]) -> dict[str, Any]:
    """Return means over seeds, 95 % intervals, and paired differences to No Selection.

    The intervals are percentile bootstrap intervals, which draw seeds with replacement and, within
    each drawn seed, questions with replacement.

    Args:
        per_seed: The values of every seed, all with the same rows.

    Returns:
        The means ``rows`` and intervals ``ci95``, and ``difference`` and ``difference_ci95`` to
        ``no_selection`` on the same questions. If ``clean_oracle`` is above it beyond the interval,
        also ``gap_closed`` = (row - no_selection) / (clean_oracle - no_selection), with its
        interval over the resamples in which it is above. Rows that are stopped on the dev set are
        compared with No Selection and the ceiling that are stopped so.
    """
    names = list(per_seed[0])
    sample = _resampled(per_seed)
    mean = {name: _mean(per_seed, name) for name in names}
    report: dict[str, Any] = {
        "seeds": len(per_seed),
        "n_questions": [len(values[names[0]]) for values in per_seed],
        "rows": {name: round(mean[name], 4) for name in names},
        "ci95": {name: _interval(sample[name]) for name in names},
        "per_seed": {
            name: [round(float(np.mean(values[name])), 4) for values in per_seed] for name in names
        },
    }
    for base, ceiling, others in (
        ("no_selection", "clean_oracle", [n for n in names if not n.endswith(DEV_STOPPED)]),
        (
            stopped_name("no_selection"),
            stopped_name("clean_oracle"),
            [name for name in names if name.endswith(DEV_STOPPED)],
        ),
    ):
        if base in others:
            others.remove(base)
            for key, values in _compared(mean, sample, base, ceiling, others).items():
                report.setdefault(key, {}).update(values)
    return report


def difference(per_seed: Sequence[Values], name: str, base: str) -> dict[str, Any]:
    """Return how far a row is above another on the same questions, with its 95 % interval."""
    pairs = [{"row": values[name], "base": values[base]} for values in per_seed]
    sample = _resampled(pairs)
    return {
        "difference": round(_mean(pairs, "row") - _mean(pairs, "base"), 4),
        "difference_ci95": _interval(sample["row"] - sample["base"]),
    }


def stopped_name(method: str) -> str:
    """Return the name of a method's row with the model of the best dev step."""
    return ("clean" if method == "clean_oracle" else method) + DEV_STOPPED


def _resampled(per_seed: Sequence[Values]) -> dict[str, np.ndarray]:
    """Return the means over seeds of every row in each resample, the same draws for all rows."""
    names = list(per_seed[0])
    rng = np.random.default_rng(0)
    draws: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(_RESAMPLES):
        seeds = rng.integers(0, len(per_seed), len(per_seed))
        means: dict[str, list[float]] = {name: [] for name in names}
        for seed in seeds:
            questions = len(per_seed[seed][names[0]])
            counts = rng.multinomial(questions, np.full(questions, 1 / questions)) / questions
            for name in names:
                means[name].append(float(counts @ per_seed[seed][name]))
        for name in names:
            draws[name].append(float(np.mean(means[name])))
    return {name: np.array(values) for name, values in draws.items()}


def _mean(per_seed: Sequence[Values], name: str) -> float:
    return float(np.mean([np.mean(values[name]) for values in per_seed]))


def _compared(
    mean: Mapping[str, float],
    sample: Mapping[str, np.ndarray],
    base: str,
    ceiling: str,
    others: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Return the differences to ``base``, and how much of its gap to ``ceiling`` is closed."""
    low, low_sample = mean[base], sample[base]
    found: dict[str, dict[str, Any]] = {
        "difference": {name: round(mean[name] - low, 4) for name in others},
        "difference_ci95": {name: _interval(sample[name] - low_sample) for name in others},
    }
    if ceiling not in mean:
        return found
    gap, gap_sample = mean[ceiling] - low, sample[ceiling] - low_sample
    # A share of a gap that may be 0 says nothing.
    if found["difference_ci95"][ceiling][0] > 0:
        open_gap = gap_sample > 0
        found["gap_closed"] = {name: round((mean[name] - low) / gap, 3) for name in others}
        found["gap_closed_ci95"] = {
            name: _interval((sample[name] - low_sample)[open_gap] / gap_sample[open_gap])
            for name in others
        }
    return found


def _interval(sample: np.ndarray) -> list[float]:
    return [round(float(end), 4) for end in np.quantile(sample, (0.025, 0.975))]
