"""Score the examples of a file, on one process or spread over the ranks of the command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bilevel import Collective
from prm.inputs.collate import Collator, EncodedExample
from prm.models.model import PRM
from prm.scoring import StepScores, score_part
from recipes.ranks import ranks_here


def score_rows(
    prm: PRM,
    params: Mapping[str, Tensor],
    encoded: Sequence[EncodedExample],
    collator: Collator,
    batch_size: int,
    bar: tqdm[Any],
    *,
    full_vocab: bool = False,
    workers: int = 0,
    tokens_per_batch: int | None = None,
) -> StepScores:
    """Return the step scores of every example on every rank, one [steps] tensor each, in order.

    The batches are those of one process, dealt to the ranks one after the other, and so are the
    bits of the scores: see ``prm.scoring.score_part``.

    Args:
        prm: The model.
        params: Values by parameter name.
        encoded: The examples.
        collator: What pads them into a batch.
        batch_size: The number of examples per forward pass.
        bar: The progress bar, which moves by the examples of this rank and then by the others.
        full_vocab: Whether probabilities are over the whole vocabulary.
        workers: The number of processes of this rank that prepare batches ahead.
        tokens_per_batch: The largest number of tokens per forward pass.

    Raises:
        DataError: An image cannot be decoded.
        bilevel.RankError: Another rank fails or is gone.
    """
    ranks = ranks_here()
    own = score_part(
        prm,
        params,
        encoded,
        collator,
        batch_size,
        part=ranks.rank,
        parts=ranks.ranks,
        full_vocab=full_vocab,
        workers=workers,
        scored=bar.update,
        tokens_per_batch=tokens_per_batch,
    )
    if ranks.ranks == 1:
        return own
    mine = len(own.rows)
    found = of_all_ranks(own, ranks)
    bar.update(len(found) - mine)
    return found


def of_all_ranks(own: StepScores, ranks: Collective) -> StepScores:
    """Return ``own`` with the scores of all ranks."""
    # Row numbers are exact in float64.
    numbers = ranks.gathered(torch.tensor(own.rows, dtype=torch.float64))
    values = ranks.gathered(torch.cat([torch.zeros(0), *(own[row] for row in own.rows)]))
    for rows, flat in zip(numbers, values, strict=True):
        start = 0
        for row in rows.to(torch.int64).tolist():
            size = len(own[row])
            own.put(row, flat[start : start + size])
            start += size
    return own
