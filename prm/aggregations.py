"""Step scores to solution scores: [..., steps] and a mask to [...].

Every function takes step scores in [0, 1] and a boolean mask of the steps that exist, ignores what
the mask hides (NaN included, in value and gradient), and returns NaN for a solution without steps.
The names are those of the literature: VisualPRM takes the mean, Math-Shepherd the minimum, DreamPRM
1.0 the sigmoid of the log-odds, divided by the number of steps.
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
"""Step scores and the mask of the steps that exist, to solution scores."""


def mean(step_scores: Scores, mask: Mask) -> SolutionScores:
    """Σ s_t / T."""
    return _fill(step_scores, mask, 0.0).sum(-1) / mask.sum(-1)


def minimum(step_scores: Scores, mask: Mask) -> SolutionScores:
    """min_t s_t; the gradient is shared evenly among tied steps."""
    return _known(_fill(step_scores, mask, torch.inf).amin(-1), mask)


def maximum(step_scores: Scores, mask: Mask) -> SolutionScores:
    """max_t s_t; the gradient is shared evenly among tied steps."""
    return _known(_fill(step_scores, mask, -torch.inf).amax(-1), mask)


def last(step_scores: Scores, mask: Mask) -> SolutionScores:
    """s_T, the score of the last step that exists."""
    steps = torch.arange(mask.shape[-1], device=mask.device).expand(mask.shape)
    last_step = torch.where(mask, steps, 0).amax(-1, keepdim=True)
    return _known(_fill(step_scores, mask, 0.0).gather(-1, last_step).squeeze(-1), mask)


def product(step_scores: Scores, mask: Mask) -> SolutionScores:
    """Π s_t: the probability that all steps are right, were they independent."""
    return _known(_fill(step_scores, mask, 1.0).prod(-1), mask)


def log_mean(step_scores: Scores, mask: Mask) -> SolutionScores:
    """exp(Σ log s_t / T), the geometric mean; 0 counts as the smallest normal number."""
    tiny = torch.finfo(step_scores.dtype).tiny
    logs = _fill(step_scores, mask, 1.0).clamp(min=tiny).log()
    return (logs.sum(-1) / mask.sum(-1)).exp()


def logit_mean(step_scores: Scores, mask: Mask) -> SolutionScores:
    """σ(Σ log(s_t / (1 − s_t)) / T): the meta loss of DreamPRM 1.0 takes its distance to the label.

    As its code computes it, except that scores are kept one rounding unit away from 0 and 1, where
    the original's log-odds are infinite.
    """
    return (_logits(step_scores, mask).sum(-1) / mask.sum(-1)).sigmoid()


def logit_sum(step_scores: Scores, mask: Mask) -> SolutionScores:
    """σ(Σ log(s_t / (1 − s_t))): ``logit_mean`` without the division by T.

    The probability that the solution is right, were every step's score independent evidence for it
    and both outcomes equally likely beforehand. Many sure steps saturate it: solutions whose sums
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
"""The functions by their names on a command line."""


def _logits(step_scores: Scores, mask: Mask) -> Scores:
    eps = torch.finfo(step_scores.dtype).eps
    return _fill(step_scores, mask, 0.5).clamp(eps, 1 - eps).logit()


def _fill(step_scores: Scores, mask: Mask, value: float) -> Scores:
    return torch.where(mask, step_scores, value)


def _known(scores: SolutionScores, mask: Mask) -> SolutionScores:
    return torch.where(mask.any(-1), scores, torch.nan)
