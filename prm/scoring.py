"""Step logits to step scores to solution scores, and scoring of many examples.

A score is read off one forward pass per solution: a causal model says at the end of step k what it
would say of the prefix that ends there, so a pass per step (VisualPRM's first release, DreamPRM
1.0) computes the same. The softmax is over the two labels in float32, not in bfloat16 over the
vocabulary at every token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prm.aggregations import Aggregation
from prm.inputs.collate import Batch, EncodedExample
from prm.inputs.workers import ordered_map
from prm.models.model import PRM, step_logits


def step_scores(
    step_logits: Float[Tensor, "*batch steps 2"], *, full_vocab: bool = False
) -> Float[Tensor, "*batch steps"]:
    """p("+") of every step, [batch, steps], from step logits [batch, steps, 2].

    Two-way by default: softmax over {+, −} = σ(z₊ − z₋). With ``full_vocab`` the columns are
    log-probabilities over the vocabulary (``step_logits(..., full_vocab=True)``): exp(log p₊).
    """
    return step_probs(step_logits, full_vocab=full_vocab)[..., 0]


def step_probs(
    step_logits: Float[Tensor, "*batch steps 2"], *, full_vocab: bool = False
) -> Float[Tensor, "*batch steps 2"]:
    """p("+") and p("-") of every step, [batch, steps, 2]; see ``step_scores``."""
    if full_vocab:
        return step_logits.exp()
    difference = step_logits[..., 0] - step_logits[..., 1]
    return torch.stack([difference.sigmoid(), (-difference).sigmoid()], dim=-1)


def aggregate(
    step_scores: Float[Tensor, "*batch steps"], mask: Bool[Tensor, "*_batch"], how: Aggregation
) -> Float[Tensor, "*batch"]:
    """Solution scores [batch] of step scores [batch, steps]; ``how`` is of ``prm.aggregations``.

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
    """Aggregated p("+") and aggregated p("-") of every solution, [batch, 2].

    The first column is the solution's score; ``prm.losses.outcome_loss`` reads both.
    """
    probs = step_probs(step_logits, full_vocab=full_vocab)
    return torch.stack([aggregate(probs[..., label], mask, how) for label in (0, 1)], dim=-1)


@torch.no_grad()
def score_examples(
    prm: PRM,
    params: Mapping[str, Tensor],
    encoded: Sequence[EncodedExample],
    collator: Callable[[Sequence[EncodedExample]], Batch],
    batch_size: int,
    *,
    full_vocab: bool = False,
    workers: int = 0,
) -> list[Float[Tensor, " _steps"]]:
    """Return the step scores p("+") of every example, one [steps] tensor each on the CPU, in order.

    Examples of similar length share a batch, so that little is spent on padding. The head
    is applied at the label positions only, to "+" and "-" only unless ``full_vocab``.

    Memory: activations of a batch without graph, and with ``full_vocab`` twice
    [batch, steps, vocabulary] float32.

    Args:
        prm: The model.
        params: Values by parameter name; others keep the model's values.
        encoded: The examples, from ``Collator.encode``.
        collator: Pads examples into a batch; a ``Collator``.
        batch_size: Examples per forward pass.
        full_vocab: Probabilities over the whole vocabulary instead of the two labels, as
            DreamPRM-1.5 scores: softmax(z)₊ at the position, where "+" and "-" do not sum to 1.
        workers: Processes that prepare batches ahead; see ``prm.inputs.workers``.

    Raises:
        DataError: An image cannot be decoded.
    """
    if batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, found {batch_size}")
    device = next(iter(params.values()), next(prm.model.parameters())).device
    order = sorted(range(len(encoded)), key=lambda row: -len(encoded[row].input_ids))
    scores: dict[int, Tensor] = {}
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    batches = ordered_map(
        lambda number: collator([encoded[row] for row in parts[number]]),
        range(len(parts)),
        workers,
    )
    for part, batch in zip(parts, batches, strict=True):
        logits = step_logits(
            prm,
            params,
            {name: value.to(device) for name, value in batch.items()},
            full_vocab=full_vocab,
            label_rows=not full_vocab,
        )
        padded = step_scores(logits, full_vocab=full_vocab).cpu()
        for row, values in zip(part, padded, strict=True):
            scores[row] = values[: len(encoded[row].label_positions)].clone()
    return [scores[row] for row in range(len(encoded))]
