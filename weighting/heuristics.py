"""Weights and labels without a second level, with which learned ones have to be compared.

Scores rank examples, of which the best share is kept; or labels are corrected by what a model, or
the rollouts that they come from, say of them.
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


def confident_labels(
    labels: Float[Tensor, "*batch steps"],
    scores: Float[Tensor, "*batch steps"],
    threshold: float = 0.25,
) -> Float[Tensor, "*batch steps"]:
    """Labels of the next round of noise-aware iterative training (NAIT): of a model that disagrees.

        ỹ'_t = r_t where |r_t − ỹ_t| > τ, else ỹ_t

    A model is trained on labels ỹ, its step scores r replace those that they are far from, and
    another model is trained on what comes of it. The correction of rollouts by a judge that comes
    before the first round in the paper is not part of this.

    Source: arXiv 2601.12748; rule and τ (of the first round) as in its published code.

    Args:
        labels: ỹ in [0, 1]; NaN where there is none.
        scores: r, p("+") of every step under the model of this round.
        threshold: τ.

    Returns:
        The labels; NaN where there was none.

    Raises:
        ValueError: ``threshold`` is not in [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"confident_labels needs a threshold in [0, 1]; found {threshold}")
    return torch.where((scores - labels).abs() > threshold, scores.to(labels.dtype), labels)


def tolerant_labels(
    shares: Float[Tensor, "examples steps"],
    confidence: Float[Tensor, " examples"],
    tolerance: int = 2,
) -> Float[Tensor, "examples steps"]:
    """Noise-tolerant labels of SCAN for solutions whose steps were judged by rollouts.

    With the share c_t of the completions after step t that came out right, the confidence SC of the
    sampling model (the share of its own solutions of the question that are right), and the first
    step t* without a right completion::

        y_t = min(c_t / SC, 1)   where t* − t ≤ d
        y_t = [c_t > 0]          for earlier steps, and without such a step

    Completions often recover from a mistake, so the mistake is likely to stand shortly before t*.
    The division takes out how able the sampling model is. Steps after t* get no label, as the
    published data end there.

    Source: arXiv 2509.16548, equations of https://scan-prm.github.io; d as in its published code.

    Args:
        shares: c in [0, 1]; NaN where there is none.
        confidence: SC in (0, 1].
        tolerance: d, in steps.

    Returns:
        The labels; NaN where there is none.

    Raises:
        ValueError: ``tolerance`` is negative, or a confidence is not in (0, 1].
    """
    if tolerance < 0:
        raise ValueError(f"tolerant_labels needs a tolerance of 0 steps or more; found {tolerance}")
    if not ((confidence > 0) & (confidence <= 1)).all():
        raise ValueError("tolerant_labels needs confidences in (0, 1]")
    steps = torch.arange(shares.shape[1], device=shares.device)
    failed = shares == 0
    first = torch.where(failed.any(1), failed.to(torch.int8).argmax(1), shares.shape[1] + tolerance)
    ahead = first[:, None] - steps
    soft = (shares / confidence[:, None]).clamp(max=1.0)
    labels = torch.where(ahead <= tolerance, soft, (shares > 0).to(shares.dtype))
    return torch.where(shares.isnan() | (ahead < 0), torch.nan, labels)
