"""The losses of the lower and the upper level, per example; the caller reduces over the batch."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor
from torch.nn.functional import logsigmoid

from prm.names import LossTarget


def step_cross_entropy(
    step_logits: Float[Tensor, "*batch steps 2"],
    labels: Float[Tensor, "*batch steps"],
    mask: Bool[Tensor, "*batch steps"],
    *,
    full_vocab: bool = False,
) -> Float[Tensor, "*batch"]:
    """Lower-level loss: cross-entropy per step, averaged over the labelled steps.

        ℓ_i = −1/|T_i| Σ_{t ∈ T_i} [ y_t log p₊ + (1 − y_t) log p₋ ]

    Args:
        step_logits: Logits [batch, steps, 2] in the columns "+" and "-". Without ``full_vocab``,
            log p₊ = log σ(z₊ − z₋).
        labels: Labels [batch, steps] in [0, 1]. They may be soft, and are NaN where there is none.
        mask: Boolean [batch, steps], True where there is a step.
        full_vocab: Whether the columns are log-probabilities over the vocabulary
            (``prm.models.model.step_logits(..., full_vocab=True)``), which are used unchanged.
            This is the loss of DreamPRM-1.5. It also lowers the probability of every token other
            than the two labels.

    Returns:
        Losses [batch]. An example without a labelled step has loss 0 and gradient 0.
    """
    known = mask & ~labels.isnan()
    labels = torch.where(known, labels, 0.5).to(step_logits.dtype)
    if full_vocab:
        plus, minus = torch.where(known[..., None], step_logits, 0.0).unbind(-1)
    else:
        difference = torch.where(known, step_logits[..., 0] - step_logits[..., 1], 0.0)
        plus, minus = logsigmoid(difference), logsigmoid(-difference)
    losses = -(labels * plus + (1 - labels) * minus)
    return torch.where(known, losses, 0.0).sum(-1) / known.sum(-1).clamp(min=1)


def step_squared_error(
    step_scores: Float[Tensor, "*batch steps"],
    labels: Float[Tensor, "*batch steps"],
    mask: Bool[Tensor, "*batch steps"],
) -> Float[Tensor, "*batch"]:
    """Lower-level loss of DreamPRM 1.0 (arXiv 2505.20241): squared distance from soft labels.

        ℓ_i = 1/|T_i| Σ_{t ∈ T_i} (p₊ − y_t)²

    Unlike the cross-entropy it is bounded: a wrong label costs at most 1. DreamPRM 1.0 treats every
    prefix of a solution as an example of its own; here the steps of a solution are averaged.

    Args:
        step_scores: The probabilities p("+") [batch, steps] of ``prm.scoring.step_scores``.
        labels: Labels [batch, steps] in [0, 1], for example the share of completions that reach
            the right answer. They are NaN where there is none.
        mask: Boolean [batch, steps], True where there is a step.

    Returns:
        Losses [batch]. An example without a labelled step has loss 0 and gradient 0.
    """
    known = mask & ~labels.isnan()
    errors = torch.where(known, step_scores, 0.0) - torch.where(known, labels, 0.0)
    return (errors**2).sum(-1) / known.sum(-1).clamp(min=1)


def outcome_loss(
    scores: Float[Tensor, "*_batch"],
    correct: Real[Tensor, "*batch"],
    loss_target: LossTarget = "+",
) -> Float[Tensor, "*batch"]:
    """Upper-level loss: squared distance of the aggregated score from its target.

    With S₊ = A(p₊), S₋ = A(p₋) and c = 1 for a right answer, 0 for a wrong one:

        "+":     (S₊ − c)²
        "both":  (S₊ − 1)² where c = 1, (S₋ − 1)² where c = 0

    as in DreamPRM-1.5 (arXiv 2509.05542). With probabilities over the two labels and the mean, the
    two targets give the same function, since S₋ = 1 − S₊. With other aggregations or probabilities
    over the vocabulary they differ.

    Args:
        scores: Scores [batch, 2] in the columns S₊ and S₋ (``prm.scoring.solution_scores``). The
            target "+" also accepts S₊ alone, as [batch].
        correct: Outcomes [batch], 1 or 0. NaN means unknown and gives a loss of NaN.
        loss_target: Which of the two losses is computed.

    Returns:
        Losses [batch].

    Raises:
        ValueError: The shapes do not fit, or ``loss_target`` is neither "+" nor "both".
    """
    if loss_target not in ("both", "+"):
        raise ValueError(f'expected loss_target "both" or "+", found {loss_target!r}')
    if scores.shape not in ((*correct.shape, 2), correct.shape):
        raise ValueError(
            f"expected scores [batch, 2] or [batch] with correct [batch], found "
            f"{tuple(scores.shape)} and {tuple(correct.shape)}"
        )
    correct = correct.to(scores.dtype)
    alone = scores.shape == correct.shape
    if loss_target == "+":
        return ((scores if alone else scores[..., 0]) - correct) ** 2
    if alone:
        raise ValueError(
            'expected scores [batch, 2] for loss_target "both", found [batch]; use '
            "prm.scoring.solution_scores"
        )
    right = torch.where(correct == 1, scores[..., 0], scores[..., 1])
    return torch.where(correct.isnan(), torch.nan, (right - 1) ** 2)


def pair_loss(
    scores: Float[Tensor, " batch"],
    correct: Real[Tensor, " batch"],
    group: Int[Tensor, " batch"],
) -> Float[Tensor, ""]:
    """Upper-level loss on the order of the candidates of one question, which best-of-N depends on.

        mean over pairs (i right, j wrong, same question) of (S_i − S_j − 1)²

    This is the squared loss of ``outcome_loss`` on differences of scores. A constant that is added
    to all scores of a question changes neither the selection nor this loss.

    Args:
        scores: Aggregated scores [batch] in [0, 1].
        correct: Outcomes [batch], 1 or 0.
        group: Numbers [batch] of the questions, equal for candidates of one question.

    Returns:
        A scalar.

    Raises:
        ValueError: No question of the batch has both a right and a wrong candidate. On a device,
            where to look would be to wait for it, the loss is NaN instead.
    """
    same = group[:, None] == group[None, :]
    pairs = same & (correct[:, None] == 1) & (correct[None, :] == 0)
    if pairs.is_cpu and not pairs.any():
        raise ValueError(
            "expected a question with both a right and a wrong candidate in the batch, found "
            f"none among {len(correct)} solutions; use more candidates per question in the meta "
            'set, a larger meta batch, or loss_target "both"'
        )
    distance = (scores[:, None] - scores[None, :] - 1) ** 2
    return torch.where(pairs, distance, 0.0).sum() / pairs.sum()
