"""Calibration of probabilities: whether 80 % of the steps that are scored .8 are right."""

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
    """Brier score, mean (p_i − y_i)²; 0 is perfect, 1/4 what always saying 1/2 gets on 0 and 1.

    Args:
        probabilities: p_i in [0, 1], [items].
        truth: y_i in [0, 1], [items]; soft labels are taken as they are.

    Raises:
        ValueError: Nothing, different lengths, or values outside [0, 1].
    """
    predicted, true = _unit(probabilities, "probabilities"), _unit(truth, "truth")
    _check(predicted, true)
    return float(np.mean((predicted - true) ** 2))


def reliability(probabilities: ArrayLike, truth: ArrayLike, bins: int = 10) -> tuple[Bin, ...]:
    """Return the bins that hold something, of equal width: (a, b], the first with its lower end.

    Arguments and errors as in ``expected_calibration_error``.
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
    """ECE = Σ_m |B_m| / n · |mean truth in B_m − mean probability in B_m|, bins of equal width.

    Guo et al. 2017 (arXiv 1706.04599) for a yes-or-no judge: the bins are over p("+") itself, as in
    a reliability diagram, not over the confidence max(p, 1 − p) in whichever label is likelier.

    Args:
        probabilities: p_i in [0, 1], [items].
        truth: y_i in [0, 1], [items].
        bins: M.

    Raises:
        ValueError: Nothing, different lengths, values outside [0, 1], or no bins.
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
