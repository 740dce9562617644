"""Step scores and solution scores from step logits, and scoring of many examples.

One forward pass scores all steps of a solution. The output of a causal model at the end of step k
depends only on the prefix that ends there, so one pass per step (the first release of VisualPRM,
DreamPRM 1.0) computes the same scores. The softmax is over the two labels in float32, rather than
over the vocabulary at every token in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import overload

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prm.aggregations import Aggregation
from prm.batches.passes import passes_of
from prm.batches.token_batches import vision_tokens_per_tile
from prm.batches.transfer import moved
from prm.batches.workers import ordered_map
from prm.data.store.encoded import MOST_HELD
from prm.inputs.collate import Batch, Collator, EncodedExample
from prm.models.model import PRM, step_logits

WINDOW = 8
"""Number of batches of the largest size whose solutions are sorted by length together, so that the
scores of a file are written in its order, and the same by every caller."""


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


class StepScores(Sequence[Tensor]):
    """The step scores of many solutions, [steps] each, in one tensor: 4 bytes a step.

    Those that were not stored are NaN.

    Args:
        counts: The number of steps of every solution.
        dtype: The type of the scores.
    """

    def __init__(self, counts: Iterable[int], dtype: torch.dtype = torch.float32) -> None:
        self._ends = np.cumsum([0, *counts])
        self._values = torch.full((int(self._ends[-1]),), math.nan, dtype=dtype)
        self._stored = np.zeros(len(self), dtype=bool)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, row: int) -> Tensor: ...
    @overload
    def __getitem__(self, row: slice) -> list[Tensor]: ...
    def __getitem__(self, row: int | slice) -> Tensor | list[Tensor]:
        if isinstance(row, slice):
            return [self[number] for number in range(len(self))[row]]
        number = range(len(self))[row]
        return self._values[self._ends[number] : self._ends[number + 1]]

    def put(self, row: int, scores: Float[Tensor, " steps"]) -> None:
        """Store the scores of a solution."""
        self[row].copy_(scores)
        self._stored[row] = True

    @property
    def rows(self) -> list[int]:
        """The solutions whose scores are stored."""
        rows: list[int] = np.flatnonzero(self._stored).tolist()
        return rows


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
    tokens_per_batch: int | None = None,
) -> list[Float[Tensor, " _steps"]]:
    """Return the step scores p("+") of every example, one [steps] tensor each on the CPU, in order.

    See ``score_part``, of which this is the whole.
    """
    return list(
        score_part(
            prm,
            params,
            encoded,
            collator,
            batch_size,
            full_vocab=full_vocab,
            workers=workers,
            scored=scored,
            tokens_per_batch=tokens_per_batch,
        )
    )


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
    tokens_per_batch: int | None = None,
) -> StepScores:
    """Return the step scores p("+") of a part of the examples on the CPU, each at its row.

    Examples of similar length share a batch, which keeps padding short. Candidates of one question
    are computed as a tree of their tokens where the model allows it and that saves operations, so
    that pictures, question and steps that they share are computed once
    (``prm.batches.prefix_trees``). The head is applied at the label positions only, and without
    ``full_vocab`` only its rows of "+" and "-".

    Memory: the activations of one batch without a graph; with ``full_vocab`` also two float32
    tensors [batch, steps, vocabulary]. Of more examples than some thousands the tokens are not
    held: they are made once for their number, and again for the batch, by the worker processes if
    there are any.

    Args:
        prm: The model.
        params: Values by parameter name. Parameters that are not named keep the model's values.
        encoded: The examples, from ``Collator.encode``, or a sequence that encodes on demand.
        collator: A ``Collator``, or another function that pads examples into a batch, without
            trees.
        batch_size: The largest number of examples per forward pass.
        part: Which of the parts.
        parts: Into how many parts the batches are dealt, one after the other. A batch is the same
            whatever their number, and so are the bits of the scores. With a model that is spread
            over processes each has a part, and as many batches, the last of all twice if need be.
        full_vocab: Whether probabilities are over the whole vocabulary, as in DreamPRM-1.5, instead
            of over the two labels. The score is then softmax(z)₊, and "+" and "-" do not sum to 1.
        workers: The number of processes that prepare batches ahead; see ``prm.batches.workers``.
        scored: A function that is called with the number of examples of every batch, for a
            progress bar.
        tokens_per_batch: The largest number of tokens per forward pass, padding and those of the
            vision tower included; see ``prm.batches.token_batches``. None means any number.

    Raises:
        DataError: An image cannot be decoded.
    """
    for name, least in (("batch_size", batch_size), ("tokens_per_batch", tokens_per_batch)):
        if least is not None and least < 1:
            raise ValueError(f"expected {name} >= 1, found {least}")
    device = next(iter(params.values()), next(prm.model.parameters())).device
    held = list(encoded) if len(encoded) <= MOST_HELD else encoded
    plan = passes_of(
        held,
        batch_size,
        tokens_per_batch,
        tile_tokens=vision_tokens_per_tile(prm.model.config),
        width=prm.tree_width if isinstance(collator, Collator) else None,
        image_tokens=prm.image_tokens,
        workers=workers,
    )
    scores: StepScores | None = None
    dealt = plan.passes[part::parts]
    if prm.spread is not None and len(dealt) * parts < len(plan.passes):
        dealt.append(plan.passes[-1])  # All processes call such a model, or none gets an answer.
    batches = ordered_map(
        lambda number: dealt[number].batch(held, collator), range(len(dealt)), workers
    )
    for now, batch in zip(dealt, batches, strict=True):
        logits = step_logits(
            prm,
            params,
            moved(batch if prm.front is None else prm.front(batch), device),
            full_vocab=full_vocab,
            label_rows=not full_vocab,
        )
        padded = step_scores(logits, full_vocab=full_vocab).cpu()
        scores = scores or StepScores(plan.steps, padded.dtype)
        for row, values in zip(now.rows, padded, strict=True):
            scores.put(row, values[: plan.steps[row]])
        scored(len(now.rows))
    return StepScores(plan.steps) if scores is None else scores
