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
from prm.scoring import score_part
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
) -> list[Tensor]:
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
    )
    found = of_all_ranks(own, ranks)
    bar.update(len(found) - len(own))
    return [found[row] for row in range(len(encoded))]


def of_all_ranks(own: Mapping[int, Tensor], ranks: Collective) -> dict[int, Tensor]:
    """Return the scores of all ranks, [steps] by row, from those of this one."""
    if ranks.ranks == 1:
        return dict(own)
    # Row numbers and lengths are exact in float64.
    index = [number for row, values in own.items() for number in (row, len(values))]
    numbers = ranks.gathered(torch.tensor(index, dtype=torch.float64))
    values = ranks.gathered(torch.cat([torch.zeros(0), *own.values()]))
    found: dict[int, Tensor] = {}
    for pairs, flat in zip(numbers, values, strict=True):
        rows, lengths = pairs.to(torch.int64).reshape(-1, 2).T.tolist()
        found |= dict(zip(rows, flat.split(lengths), strict=True))
    return found
