"""Calibration of probabilities: whether 80 % of the steps with score 0.8 are right."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


class Bin(NamedTuple):
    """One bar of a reliability diagram."""

    low: float
    high: float
    items: int
    mean_probability: float
    mean_truth: float


def brier(probabilities: ArrayLike, truth: ArrayLike) -> float:
    """Return the Brier score, mean (p_i − y_i)².

    0 is perfect; the constant 1/2 scores 1/4 on labels of 0 and 1.

    Args:
        probabilities: The probabilities p_i in [0, 1], [items].
        truth: The labels y_i in [0, 1], [items], which may be soft.

    Raises:
        ValueError: There are no items, the lengths differ, or values are outside [0, 1].
    """
    predicted, true = _unit(probabilities, "probabilities"), _unit(truth, "truth")
    _check(predicted, true)
    return float(np.mean((predicted - true) ** 2))


def reliability(probabilities: ArrayLike, truth: ArrayLike, bins: int = 10) -> tuple[Bin, ...]:
    """Return the non-empty bins (a, b] of equal width; the first includes its lower end.

    Arguments and errors are those of ``expected_calibration_error``.
    """
    if bins < 1:
        raise ValueError(f"expected bins >= 1, found {bins}")
    predicted, true = _unit(probabilities, "probabilities"), _unit(truth, "truth")
    _check(predicted, true)
    edges = np.linspace(0, 1, bins + 1)
    bin_of = np.searchsorted(edges[1:-1], predicted)
    counts = np.bincount(bin_of, minlength=bins)
    predicted_sums = np.bincount(bin_of, predicted, bins)
    true_sums = np.bincount(bin_of, true, bins)
    return tuple(
        Bin(
            low=float(edges[index]),
            high=float(edges[index + 1]),
            items=int(counts[index]),
            mean_probability=float(predicted_sums[index] / counts[index]),
            mean_truth=float(true_sums[index] / counts[index]),
        )
        for index in range(bins)
        if counts[index]
    )


def expected_calibration_error(probabilities: ArrayLike, truth: ArrayLike, bins: int = 10) -> float:
    """Return the expected calibration error over bins of equal width.

        ECE = Σ_m |B_m| / n · |mean truth in B_m − mean probability in B_m|

    Source: Guo et al. 2017 (arXiv 1706.04599), here for a binary judge. The bins are over p("+")
    itself, as in a reliability diagram, not over the confidence max(p, 1 − p).

    Args:
        probabilities: The probabilities p_i in [0, 1], [items].
        truth: The labels y_i in [0, 1], [items].
        bins: The number M of bins.

    Raises:
        ValueError: There are no items or no bins, the lengths differ, or values are outside [0, 1].
    """
    diagram = reliability(probabilities, truth, bins)
    total = sum(bar.items for bar in diagram)
    return sum(bar.items * abs(bar.mean_truth - bar.mean_probability) for bar in diagram) / total


def _unit(values: ArrayLike, name: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    outside = ~((array >= 0) & (array <= 1))
    if array.ndim != 1 or outside.any():
        found = f"{array[outside][0]}" if array.ndim == 1 else f"shape {array.shape}"
        raise ValueError(f"expected {name} to be a list of values in [0, 1], found {found}")
    return array


def _check(predicted: Floats, true: Floats) -> None:
    if predicted.shape != true.shape or not len(predicted):
        raise ValueError(
            f"expected two lists of one length, not empty, found {len(predicted)} and {len(true)}"
        )
