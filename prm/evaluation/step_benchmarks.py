"""What the benchmarks of step judgements report, by their own definitions.

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
    """Return the index of the first wrong step, ``NO_ERROR`` if all are right.

    This is the label of ProcessBench. None (a step without a judgement) makes the answer unknown,
    None, unless a wrong step comes before it.
    """
    for step, judged in enumerate(right):
        if judged is None:
            return None
        if not judged:
            return step
    return NO_ERROR


class ProcessBench(NamedTuple):
    """ProcessBench's figures and how many solutions they are over."""

    f1: float
    accuracy_erroneous: float
    accuracy_correct: float
    erroneous: int
    correct: int


def process_bench(truth: Sequence[int], predicted: Sequence[int]) -> ProcessBench:
    """F1 of ProcessBench (arXiv 2412.06559): the harmonic mean of two accuracies.

        F1 = 2 a_err a_ok / (a_err + a_ok)

    a_err: share of the solutions with an error whose first error is found at exactly its step;
    a_ok: share of the solutions without error that are judged to have none. 0 if both are 0.

    Args:
        truth: ``first_error`` of the labels, per solution.
        predicted: ``first_error`` of the judgements.

    Raises:
        ValueError: Different lengths, or not both kinds of solution.
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
    """Macro F1 over all steps, per source, and the plain mean over the sources."""

    pooled: float
    per_source: dict[str, float]
    mean: float


def visual_process_bench(
    truth: ArrayLike, predicted: ArrayLike, sources: Sequence[str]
) -> VisualProcessBench:
    """Macro F1, (F1 of right steps + F1 of wrong steps) / 2, as VisualProcessBench has it.

    All labelled steps are judged, those after an error too; neutral ones are left out by the
    caller. The benchmark's overall figure (arXiv 2503.10291) is the pooled one, "micro average over
    sources": every step counts alike. The mean over sources is another number.

    Args:
        truth: 1 (right) or 0 of each step, [steps].
        predicted: 1 or 0 of each step, [steps].
        sources: Name of the source of each step, [steps].

    Raises:
        ValueError: Different lengths, no steps, or values other than 0 and 1.
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
    """The threshold with the highest macro F1, and that F1; for a dev set, never a test set.

    Candidates are 1/2 and the middles between neighbours among the scores, 0 and 1; of several best
    ones the one nearest to 1/2 is taken. O(n log n) in the number of steps.

    Raises:
        ValueError: Different lengths, or not both kinds of step.
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
