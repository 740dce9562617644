"""Metrics of selections over questions, and of scores against true labels.

The metrics of step benchmarks are in ``prm.evaluation.step_benchmarks``, those of calibration in
``prm.evaluation.calibration``.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import comb
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def pass_at_k(correct: ArrayLike, k: int) -> float:
    """Return the chance that k of N candidates, drawn without replacement, include a right one.

        1 − C(N − c, k) / C(N, k),  c = Σ correct

    as in Codex (arXiv 2107.03374). ``k = N`` is the oracle.

    Raises:
        ValueError: ``k`` is not in 1 to N.
    """
    right = _binary(correct, "correct")
    _check_k(k, len(right))
    return 1 - comb(len(right) - int(right.sum()), k) / comb(len(right), k)


def expected_best_of_k(scores: ArrayLike, correct: ArrayLike, k: int) -> float:
    """Return the exact average of best-of-k over all subsets of k of the N scored candidates.

    With candidates sorted by descending score and rank r counted from 0,

        E = Σ_r c_(r) C(N − 1 − r, k − 1) / C(N, k)

    since rank r is the best of a subset if the other k − 1 are below it. Tied candidates share the
    mean of their c, as in a fair draw among them. At k = N it equals ``best_of_n``, and at k = 1
    pass@1.

    Raises:
        ValueError: The lengths differ, k is not in 1 to N, or a score is not a number.
    """
    values = _numbers(scores, "scores")
    right = _numbers(correct, "correct")
    _check_same_length(values, right)
    count = len(values)
    _check_k(k, count)
    levels, group = np.unique(-values, return_inverse=True)
    shared = np.bincount(group, right, len(levels)) / np.bincount(group, minlength=len(levels))
    by_rank = shared[np.sort(group)]
    chances = [comb(count - 1 - rank, k - 1) / comb(count, k) for rank in range(count)]
    return float(by_rank @ np.array(chances))


def best_of_k_curve(scores: ArrayLike, correct: ArrayLike) -> list[float]:
    """Return ``expected_best_of_k`` for k = 1, ..., N."""
    return [expected_best_of_k(scores, correct, k) for k in range(1, np.size(scores) + 1)]


def roc_auc(truth: ArrayLike, scores: ArrayLike) -> float:
    """Return the chance that a true item scores above a false one; a tie counts one half.

    Args:
        truth: The label of each item, 1 or 0.
        scores: The score of each item, higher for items that are more likely true.

    Raises:
        ValueError: The lengths differ, one kind of item is missing, or a score is not a number.
    """
    true = _binary(truth, "truth").astype(bool)
    values = _numbers(scores, "scores")
    _check_same_length(true, values)
    positives, negatives = int(true.sum()), int((~true).sum())
    if not positives or not negatives:
        raise ValueError(
            f"expected items of both kinds, found {positives} true and {negatives} false"
        )
    ranks = _ranks(values)
    above = ranks[true].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def rank_correlation(left: ArrayLike, right: ArrayLike) -> float:
    """Return Spearman's rank correlation, the correlation of the ranks; ties share their mean rank.

    Args:
        left: A number of each item.
        right: Another number of each item.

    Raises:
        ValueError: The lengths differ, a value is not a number, or all of one side are equal.
    """
    columns = _numbers(left, "left"), _numbers(right, "right")
    _check_same_length(*columns)
    one, other = (ranks - ranks.mean() for ranks in map(_ranks, columns))
    scale = float(np.sqrt((one @ one) * (other @ other)))
    if not scale:
        raise ValueError("expected numbers that differ on both sides; on one all are equal")
    return float(one @ other) / scale


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rank of each value, from 1; ties share their mean."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[group]
    return ranks


def f1(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Return the F1 of the true items, 2 TP / (2 TP + FP + FN); it is 0 if TP is 0.

    The F1 of wrong steps is that of both arguments negated.

    Raises:
        ValueError: The lengths differ, or values are not 0 or 1.
    """
    true = _binary(truth, "truth").astype(bool)
    judged = _binary(predicted, "predicted").astype(bool)
    _check_same_length(true, judged)
    hits = int((true & judged).sum())
    misses = int((true ^ judged).sum())
    return 2 * hits / (2 * hits + misses) if hits else 0.0


def macro_f1(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Return the mean of the F1 of true and that of false items, as in VisualProcessBench."""
    true, judged = _binary(truth, "truth"), _binary(predicted, "predicted")
    return (f1(true, judged) + f1(1 - true, 1 - judged)) / 2


def bootstrap_interval(
    values: ArrayLike, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of ``values`` over questions.

    Args:
        values: One value per question, such as the result of ``best_of_n``. Candidates of one
            question are not independent: average over them first.
        level: The coverage, in (0, 1).
        resamples: The number of resampled means.
        seed: The seed of the resampling. The same seed resamples the same questions.

    Returns:
        The lower and the upper end.

    Raises:
        ValueError: There are no values, a value is not a number, or ``level`` is outside (0, 1).
    """
    numbers = _numbers(values, "values")
    if not len(numbers):
        raise ValueError("expected at least one value, found none")
    if not 0 < level < 1:
        raise ValueError(f"expected a level between 0 and 1, found {level}")
    draws = _draws(len(numbers), resamples, seed)
    means = np.concatenate([numbers[drawn].mean(axis=1) for drawn in draws])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _draws(count: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield which of ``count`` questions each resample draws, [rows, count], in blocks of rows."""
    rng = np.random.default_rng(seed)
    rows = max(1, 2**20 // count)  # Resamples per block, which bounds the memory.
    for start in range(0, resamples, rows):
        yield rng.integers(count, size=(min(rows, resamples - start), count))


def roc_auc_interval(
    truth: ArrayLike,
    scores: ArrayLike,
    questions: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of ``roc_auc`` over questions.

    Questions are resampled with all their items, as in ``bootstrap_interval``, since the items of
    one question are not independent. A resample that lacks one kind of item has no AUC and is left
    out. Cost: O(resamples · items).

    Args:
        truth: The label of each item, 1 or 0.
        scores: The score of each item.
        questions: The question of each item, any values that can be told apart.
        level: The coverage, in (0, 1).
        resamples: The number of resamples.
        seed: The seed of the resampling.

    Raises:
        ValueError: ``roc_auc`` raises it, the lengths differ, or ``level`` is outside (0, 1).
    """
    roc_auc(truth, scores)  # Its checks.
    if not 0 < level < 1:
        raise ValueError(f"expected a level between 0 and 1, found {level}")
    true, values = _binary(truth, "truth").astype(bool), _numbers(scores, "scores")
    _, question = np.unique(np.asarray(questions), return_inverse=True)
    _check_same_length(true, question)
    count = int(question.max()) + 1
    wins, pairs = _resampled(true, values, question, _draws(count, resamples, seed))
    low, high = np.quantile(wins[pairs > 0] / pairs[pairs > 0], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _times(drawn: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how often each resample has drawn each question, [rows, count]."""
    shifted = drawn + drawn.shape[1] * np.arange(len(drawn))[:, None]
    return np.bincount(shifted.ravel(), minlength=shifted.size).reshape(drawn.shape)


def _resampled(
    true: NDArray[np.bool_],
    scores: Floats,
    question: NDArray[np.int64],
    draws: Iterator[NDArray[np.int64]],
) -> tuple[Floats, Floats]:
    """Return how often true items score above false ones, and the pairs of both, per resample.

    A tie counts one half. All counts are integers, so that no sum rounds.
    """
    order = np.argsort(scores[true])
    above, of_true = scores[true][order], question[true][order]
    of_false = question[~true]
    first, last = (np.searchsorted(above, scores[~true], side=side) for side in ("left", "right"))
    wins, pairs = [], []
    for drawn in draws:
        for times in _times(drawn):
            lower = np.concatenate([[0], np.cumsum(times[of_true])])  # true items up to a place
            false = times[of_false]
            wins.append(false @ (2 * lower[-1] - lower[first] - lower[last]) / 2)
            pairs.append(false.sum() * lower[-1])
    return np.array(wins, dtype=np.float64), np.array(pairs, dtype=np.float64)


def paired_interval(
    values: ArrayLike,
    baseline: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the bootstrap interval of mean(values − baseline) over the same questions.

    The difficulty of a question affects both selectors and cancels in the difference, so this
    interval is narrower than two separate ones suggest.

    Raises:
        ValueError: The lengths differ, or ``bootstrap_interval`` raises it.
    """
    first, second = _numbers(values, "values"), _numbers(baseline, "baseline")
    _check_same_length(first, second)
    return bootstrap_interval(first - second, level=level, resamples=resamples, seed=seed)


class PairedTest(NamedTuple):
    """The numbers of questions on which one of two selectors is better, and the p-value."""

    better: int
    worse: int
    p_value: float


def mcnemar(values: ArrayLike, baseline: ArrayLike) -> PairedTest:
    """Return McNemar's test in its exact, binomial, two-sided form.

    With b questions where ``values`` is higher and c where ``baseline`` is, under the hypothesis
    that either is equally likely to be the higher one,

        p = min(1, 2 Σ_{i ≤ min(b, c)} C(b + c, i) / 2^(b + c)),

    which is 1 if they never differ. Values of 0 and 1 (wrong, right) give McNemar's test. Values in
    between, which result from shared ties, give the sign test, of which it is a special case.

    Args:
        values: One value per question, such as the results of ``best_of_n``.
        baseline: The values of another selector, for the same questions in the same order.

    Raises:
        ValueError: The lengths differ, or a value is not a number.
    """
    first, second = _numbers(values, "values"), _numbers(baseline, "baseline")
    _check_same_length(first, second)
    better, worse = int((first > second).sum()), int((first < second).sum())
    differ = better + worse
    tail = sum(comb(differ, count) for count in range(min(better, worse) + 1))
    return PairedTest(better, worse, min(1.0, 2 * tail / 2**differ))


def _numbers(values: ArrayLike, name: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or np.isnan(array).any():
        raise ValueError(
            f"expected {name} to be a list of numbers, found shape {array.shape} with "
            f"{int(np.isnan(array).sum())} NaN"
        )
    return array


def _binary(values: ArrayLike, name: str) -> Floats:
    array = _numbers(values, name)
    if not np.isin(array, (0, 1)).all():
        raise ValueError(f"expected {name} to be 0 or 1, found {array[~np.isin(array, (0, 1))][0]}")
    return array


def _check_k(k: int, count: int) -> None:
    if not 1 <= k <= count:
        raise ValueError(f"expected 1 <= k <= {count}, the number of candidates, found k = {k}")


def _check_same_length(first: NDArray[Any], second: NDArray[Any]) -> None:
    if first.shape != second.shape:
        raise ValueError(f"expected two lists of one length, found {len(first)} and {len(second)}")
