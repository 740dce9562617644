"""Step scores and solution scores from step logits, and scoring of many examples.

One forward pass scores all steps of a solution. The output of a causal model at the end of step k
depends only on the prefix that ends there, so one pass per step (the first release of VisualPRM,
DreamPRM 1.0) computes the same scores. The softmax is over the two labels in float32, rather than
over the vocabulary at every token in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prm.aggregations import Aggregation
from prm.inputs.collate import Batch, EncodedExample
from prm.inputs.transfer import moved
from prm.inputs.workers import ordered_map
from prm.models.model import PRM, step_logits


def step_scores(
    step_logits: Float[Tensor, "*batch steps 2"], *, full_vocab: bool = False
) -> Float[Tensor, "*batch steps"]:
    """Return p("+") of every step, [batch, steps], from step logits [batch, steps, 2].

    By default p₊ = σ(z₊ − z₋), the softmax over the two labels. With ``full_vocab`` the columns are
    log-probabilities over the vocabulary (``step_logits(..., full_vocab=True)``), and p₊ is the
    exponential of the first.
    """
    return step_probs(step_logits, full_vocab=full_vocab)[..., 0]


def step_probs(
    step_logits: Float[Tensor, "*batch steps 2"], *, full_vocab: bool = False
) -> Float[Tensor, "*batch steps 2"]:
    """Return p("+") and p("-") of every step, [batch, steps, 2]; see ``step_scores``."""
    if full_vocab:
        return step_logits.exp()
    difference = step_logits[..., 0] - step_logits[..., 1]
    return torch.stack([difference.sigmoid(), (-difference).sigmoid()], dim=-1)


def aggregate(
    step_scores: Float[Tensor, "*batch steps"], mask: Bool[Tensor, "*_batch"], how: Aggregation
) -> Float[Tensor, "*batch"]:
    """Return solution scores [batch] of step scores [batch, steps].

    Args:
        step_scores: Scores [batch, steps] in [0, 1].
        mask: Boolean [batch, steps], True where there is a step.
        how: A function of ``prm.aggregations``.

    Raises:
        ValueError: The shapes of scores and mask differ.
    """
    if step_scores.shape != mask.shape:
        raise ValueError(
            f"expected step_scores and mask of one shape [..., steps], found "
            f"{tuple(step_scores.shape)} and {tuple(mask.shape)}"
        )
    return how(step_scores, mask)


def solution_scores(
    step_logits: Float[Tensor, "*batch steps 2"],
    mask: Bool[Tensor, "*batch steps"],
    how: Aggregation,
    *,
    full_vocab: bool = False,
) -> Float[Tensor, "*batch 2"]:
    """Return aggregated p("+") and aggregated p("-") of every solution, [batch, 2].

    The first column is the solution's score; ``prm.losses.outcome_loss`` reads both.
    """
    probs = step_probs(step_logits, full_vocab=full_vocab)
    return torch.stack([aggregate(probs[..., label], mask, how) for label in (0, 1)], dim=-1)


def score_examples(
    prm: PRM,
    params: Mapping[str, Tensor],
    encoded: Sequence[EncodedExample],
    collator: Callable[[Sequence[EncodedExample]], Batch],
    batch_size: int,
    *,
    full_vocab: bool = False,
    workers: int = 0,
    scored: Callable[[int], object] = lambda examples: None,
) -> list[Float[Tensor, " _steps"]]:
    """Return the step scores p("+") of every example, one [steps] tensor each on the CPU, in order.

    See ``score_part``, of which this is the whole.
    """
    found = score_part(
        prm,
        params,
        encoded,
        collator,
        batch_size,
        full_vocab=full_vocab,
        workers=workers,
        scored=scored,
    )
    return [found[row] for row in range(len(encoded))]


@torch.no_grad()
def score_part(
    prm: PRM,
    params: Mapping[str, Tensor],
    encoded: Sequence[EncodedExample],
    collator: Callable[[Sequence[EncodedExample]], Batch],
    batch_size: int,
    *,
    part: int = 0,
    parts: int = 1,
    full_vocab: bool = False,
    workers: int = 0,
    scored: Callable[[int], object] = lambda examples: None,
) -> dict[int, Float[Tensor, " _steps"]]:
    """Return the step scores p("+") of a part of the examples, [steps] on the CPU, by row.

    Examples of similar length share a batch, which keeps padding short. The head is applied at the
    label positions only, and without ``full_vocab`` only its rows of "+" and "-".

    Memory: the activations of one batch without a graph; with ``full_vocab`` also two float32
    tensors [batch, steps, vocabulary].

    Args:
        prm: The model.
        params: Values by parameter name. Parameters that are not named keep the model's values.
        encoded: The examples, from ``Collator.encode``.
        collator: A ``Collator``, which pads examples into a batch.
        batch_size: The number of examples per forward pass.
        part: Which of the parts.
        parts: Into how many parts the batches are dealt, one after the other. A batch is the same
            whatever their number, and so are the bits of the scores.
        full_vocab: Whether probabilities are over the whole vocabulary, as in DreamPRM-1.5, instead
            of over the two labels. The score is then softmax(z)₊, and "+" and "-" do not sum to 1.
        workers: The number of processes that prepare batches ahead; see ``prm.inputs.workers``.
        scored: A function that is called with the number of examples of every batch, for a
            progress bar.

    Raises:
        DataError: An image cannot be decoded.
    """
    if batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, found {batch_size}")
    device = next(iter(params.values()), next(prm.model.parameters())).device
    order = sorted(range(len(encoded)), key=lambda row: -len(encoded[row].input_ids))
    scores: dict[int, Tensor] = {}
    cut = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    dealt = cut[part::parts]
    batches = ordered_map(
        lambda number: collator([encoded[row] for row in dealt[number]]),
        range(len(dealt)),
        workers,
    )
    for rows, batch in zip(dealt, batches, strict=True):
        logits = step_logits(
            prm,
            params,
            moved(batch, device),
            full_vocab=full_vocab,
            label_rows=not full_vocab,
        )
        padded = step_scores(logits, full_vocab=full_vocab).cpu()
        for row, values in zip(rows, padded, strict=True):
            scores[row] = values[: len(encoded[row].label_positions)].clone()
        scored(len(rows))
    return scores
