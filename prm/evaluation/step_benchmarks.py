"""The metrics of ProcessBench and VisualProcessBench, by the benchmarks' own definitions.

A step is judged right if its score exceeds the threshold; at 1/2, with scores p("+") over {+, −},
that is a greedy reply of "+".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from prm.evaluation.metrics import macro_f1

NO_ERROR = -1


def first_error(right: Sequence[bool | None]) -> int | None:
    """Return the index of the first wrong step, or ``NO_ERROR`` if all are right.

    This is the label of ProcessBench. If a step without a judgement (None) comes before the first
    wrong step, the index is unknown and the result None.
    """
    for step, judged in enumerate(right):
        if judged is None:
            return None
        if not judged:
            return step
    return NO_ERROR


class ProcessBench(NamedTuple):
    """The metrics of ProcessBench and the numbers of solutions behind them."""

    f1: float
    accuracy_erroneous: float
    accuracy_correct: float
    erroneous: int
    correct: int


def process_bench(truth: Sequence[int], predicted: Sequence[int]) -> ProcessBench:
    """Return the F1 of ProcessBench (arXiv 2412.06559), the harmonic mean of two accuracies.

        F1 = 2 a_err a_ok / (a_err + a_ok)

    a_err is the share of the solutions with an error whose first error is predicted at exactly its
    step; a_ok is the share of the solutions without error that are predicted to have none. F1 is 0
    if both are 0.

    Args:
        truth: The ``first_error`` of the labels, per solution.
        predicted: The ``first_error`` of the judgements, per solution.

    Raises:
        ValueError: The lengths differ, or one kind of solution is missing.
    """
    if len(truth) != len(predicted):
        raise ValueError(f"expected lists of one length, found {len(truth)} and {len(predicted)}")
    pairs = list(zip(truth, predicted, strict=True))
    wrong = [step == true for true, step in pairs if true != NO_ERROR]
    fine = [step == true for true, step in pairs if true == NO_ERROR]
    if not wrong or not fine:
        raise ValueError(
            f"expected solutions with and without an error, found {len(wrong)} with and "
            f"{len(fine)} without"
        )
    error, correct = sum(wrong) / len(wrong), sum(fine) / len(fine)
    both = error + correct
    return ProcessBench(
        2 * error * correct / both if both else 0.0, error, correct, len(wrong), len(fine)
    )


class VisualProcessBench(NamedTuple):
    """The macro F1 over all steps and per source, and the unweighted mean over the sources."""

    pooled: float
    per_source: dict[str, float]
    mean: float


def visual_process_bench(
    truth: ArrayLike, predicted: ArrayLike, sources: Sequence[str]
) -> VisualProcessBench:
    """Return the macro F1 of VisualProcessBench, (F1 of right steps + F1 of wrong steps) / 2.

    All labelled steps count, including those after an error; the caller leaves out neutral ones.
    The benchmark's overall metric (arXiv 2503.10291) pools the steps of all sources ("micro average
    over sources"), so that every step has the same weight. The mean over sources is another number.

    Args:
        truth: The label of each step, 1 (right) or 0, [steps].
        predicted: The judgement of each step, 1 or 0, [steps].
        sources: The name of each step's source, [steps].

    Raises:
        ValueError: There are no steps, the lengths differ, or values are not 0 or 1.
    """
    true, judged = np.asarray(truth), np.asarray(predicted)
    names = np.asarray(sources, dtype=str)
    if not len(names) or names.shape != true.shape:
        raise ValueError(f"expected a source per step, found {len(names)} for {len(true)} steps")
    per_source = {
        str(name): macro_f1(true[names == name], judged[names == name])
        for name in dict.fromkeys(names.tolist())
    }
    return VisualProcessBench(
        macro_f1(true, judged), per_source, sum(per_source.values()) / len(per_source)
    )


def best_threshold(truth: ArrayLike, scores: ArrayLike) -> tuple[float, float]:
    """Return the threshold with the highest macro F1, and that F1.

    Use it on a dev set, never on the test set. Candidates are 1/2 and the midpoints between
    neighbours among the scores, 0 and 1. Among several best ones, the nearest to 1/2 is taken.
    Cost: O(n log n) for n steps.

    Raises:
        ValueError: The lengths differ, or one kind of step is missing.
    """
    true = np.asarray(truth).astype(bool)
    values = np.asarray(scores, dtype=np.float64)
    if true.shape != values.shape or true.all() or not true.any():
        raise ValueError(
            f"expected right and wrong steps with a score each, found {int(true.sum())} right of "
            f"{len(true)} and {len(values)} scores"
        )
    levels = np.unique(np.append(values, (0.0, 1.0)))
    thresholds = np.append((levels[1:] + levels[:-1]) / 2, 0.5)
    right, wrong = np.sort(values[true]), np.sort(values[~true])
    hits = len(right) - np.searchsorted(right, thresholds, side="right")
    false_hits = len(wrong) - np.searchsorted(wrong, thresholds, side="right")
    rejected = len(wrong) - false_hits
    misses = false_hits + (len(right) - hits)
    figures = (hits / (hits + misses / 2) + rejected / (rejected + misses / 2)) / 2
    best = figures >= figures.max() - 1e-12
    chosen = thresholds[best][np.argmin(np.abs(thresholds[best] - 0.5))]
    return float(chosen), float(figures.max())
