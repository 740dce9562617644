"""Numbers that tell what weights do."""

from __future__ import annotations

from torch import Tensor

from weighting.bounds import Bound


def effective_sample_size(weights: Tensor) -> float:
    """``(Σ w)² / Σ w²`` (Kish): how many equally weighted instances the weights are worth.

    Between 1 and the number of instances for non-negative weights; 0 when all weights are 0.
    """
    total, squares = float(weights.sum()), float((weights * weights).sum())
    return 0.0 if squares == 0 else total * total / squares


def fraction_at_bound(raw_weights: Tensor, bound: Bound, tolerance: float = 0.01) -> float:
    """Share of weights within ``tolerance`` × width of an end of the bound's range.

    0 for a bound with an infinite range.
    """
    lo, hi = bound.range
    if hi - lo == float("inf"):
        return 0.0
    margin = tolerance * (hi - lo)
    weights = bound(raw_weights.detach())
    return float(((weights <= lo + margin) | (weights >= hi - margin)).float().mean())
