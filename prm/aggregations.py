"""Aggregations of step scores [..., steps] to solution scores [...].

Every function takes step scores s_t in [0, 1] and a boolean mask of the T steps that exist. Masked
scores affect neither value nor gradient, even if they are NaN. A solution without steps gets NaN.
The names are those of the literature: VisualPRM uses the mean, Math-Shepherd the minimum, and
DreamPRM 1.0 the sigmoid of the mean log-odds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prm.names import AggregationName

Scores = Float[Tensor, "*batch steps"]
Mask = Bool[Tensor, "*batch steps"]
SolutionScores = Float[Tensor, "*batch"]
Aggregation = Callable[[Scores, Mask], SolutionScores]
"""A function from step scores and the mask of the steps that exist to solution scores."""


def mean(step_scores: Scores, mask: Mask) -> SolutionScores:
    """Return the mean, Σ s_t / T."""
    return _fill(step_scores, mask, 0.0).sum(-1) / mask.sum(-1)


def minimum(step_scores: Scores, mask: Mask) -> SolutionScores:
    """Return min_t s_t; tied steps share the gradient evenly."""
    return _known(_fill(step_scores, mask, torch.inf).amin(-1), mask)


def maximum(step_scores: Scores, mask: Mask) -> SolutionScores:
    """Return max_t s_t; tied steps share the gradient evenly."""
    return _known(_fill(step_scores, mask, -torch.inf).amax(-1), mask)


def last(step_scores: Scores, mask: Mask) -> SolutionScores:
    """Return s_T, the score of the last step that exists."""
    steps = torch.arange(mask.shape[-1], device=mask.device).expand(mask.shape)
    last_step = torch.where(mask, steps, 0).amax(-1, keepdim=True)
    return _known(_fill(step_scores, mask, 0.0).gather(-1, last_step).squeeze(-1), mask)


def product(step_scores: Scores, mask: Mask) -> SolutionScores:
    """Return Π s_t, the probability that all steps are right if they are independent."""
    return _known(_fill(step_scores, mask, 1.0).prod(-1), mask)


def log_mean(step_scores: Scores, mask: Mask) -> SolutionScores:
    """Return exp(Σ log s_t / T), the geometric mean; 0 counts as the smallest normal number."""
    tiny = torch.finfo(step_scores.dtype).tiny
    logs = _fill(step_scores, mask, 1.0).clamp(min=tiny).log()
    return (logs.sum(-1) / mask.sum(-1)).exp()


def logit_mean(step_scores: Scores, mask: Mask) -> SolutionScores:
    """Return σ(Σ log(s_t / (1 − s_t)) / T), the score in the meta loss of DreamPRM 1.0.

    It is computed as in the code of DreamPRM 1.0, except that scores are kept one rounding unit
    away from 0 and 1, where the log-odds are infinite.
    """
    return (_logits(step_scores, mask).sum(-1) / mask.sum(-1)).sigmoid()


def logit_sum(step_scores: Scores, mask: Mask) -> SolutionScores:
    """Return σ(Σ log(s_t / (1 − s_t))), which is ``logit_mean`` without the division by T.

    This is the probability that the solution is right if every step's score is independent evidence
    for it and both outcomes have the same prior probability. It saturates: solutions whose sums
    exceed about 17 (float32) or 37 (float64) tie at 1.
    """
    return _known(_logits(step_scores, mask).sum(-1).sigmoid(), mask)


AGGREGATIONS: Mapping[AggregationName, Aggregation] = {
    "mean": mean,
    "min": minimum,
    "max": maximum,
    "last": last,
    "product": product,
    "log_mean": log_mean,
    "logit_mean": logit_mean,
    "logit_sum": logit_sum,
}
"""The aggregations by their names on the command line."""


def _logits(step_scores: Scores, mask: Mask) -> Scores:
    eps = torch.finfo(step_scores.dtype).eps
    return _fill(step_scores, mask, 0.5).clamp(eps, 1 - eps).logit()


def _fill(step_scores: Scores, mask: Mask, value: float) -> Scores:
    return torch.where(mask, step_scores, value)


def _known(scores: SolutionScores, mask: Mask) -> SolutionScores:
    return torch.where(mask.any(-1), scores, torch.nan)
