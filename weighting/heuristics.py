"""Weights without a second level: scores that rank examples, and the best share of them kept.

What learned weights have to be compared with, at the same share of kept examples.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def balanced_information(
    labels: Float[Tensor, "examples steps"],
    mask: Bool[Tensor, "examples steps"],
    *,
    alpha: float = 0.05,
) -> Float[Tensor, " examples"]:
    """Balanced-Information Score of every example: mixed labels, and reliable positive ones.

        y_t = [s_t > 0]    p = mean_t y_t    R = mean of s_t over y_t = 1 (1 where there is none)
        BIS = (p (1 − p) + α) · R

    Source: arXiv 2602.04145 §4; α as in its published code. With hard labels R is 1, and the score
    says how evenly "+" and "-" are mixed.

    Args:
        labels: Share s of completions that came out right, in [0, 1]; NaN where there is none.
        mask: Which steps exist.
        alpha: How much an example whose labels are all alike still counts.

    Returns:
        The scores; NaN for an example without a labelled step.

    Raises:
        ValueError: ``alpha`` is not positive.
    """
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"balanced_information needs a positive alpha; found {alpha}")
    known = mask & ~labels.isnan()
    scores = torch.where(known, labels, 0.0)
    positive = (scores > 0).sum(-1)
    share = positive.to(scores.dtype) / known.sum(-1)
    reliability = torch.where(positive > 0, scores.sum(-1) / positive.clamp(min=1), 1.0)
    return (share * (1 - share) + alpha) * reliability


def keep_best(
    scores: Float[Tensor, " examples"], share: float, groups: Sequence[Hashable] | None = None
) -> Float[Tensor, " examples"]:
    """Give 1 to the ``share`` of the examples with the highest scores, 0 to the others.

    max(1, ⌊share · n⌋) of n are kept; of equal scores the first.

    Args:
        scores: What the examples are ranked by, none NaN.
        share: Share to keep, in (0, 1].
        groups: Name of every example's group: rank within each, and keep the share of every one.

    Raises:
        ValueError: ``share`` is outside (0, 1], a score is NaN, or lengths differ.
    """
    if not 0 < share <= 1:
        raise ValueError(f"keep_best needs a share in (0, 1]; found {share}")
    if scores.isnan().any():
        raise ValueError(f"keep_best needs scores; found NaN for {int(scores.isnan().sum())}")
    names = [None] * len(scores) if groups is None else list(groups)
    if len(names) != len(scores):
        raise ValueError(f"keep_best: found {len(scores)} scores and {len(names)} groups")
    rows: dict[Hashable, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    kept = torch.zeros(len(scores))
    for members in rows.values():
        order = torch.argsort(scores[members], descending=True, stable=True)
        # The product of floats may fall short of a whole number by rounding.
        count = max(1, math.floor(share * len(members) + 1e-9))
        kept[[members[rank] for rank in order[:count].tolist()]] = 1.0
    return kept
