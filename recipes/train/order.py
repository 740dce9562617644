"""The order of data: a pure function of seed and step, so that it needs no state to be resumed."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

_EPOCH_STRIDE = 1_000_003  # keeps the seeds of (seed, epoch) pairs apart


def epoch_order(rows: int, seed: int) -> Callable[[int, int], list[int]]:
    """Rows of any stretch of an endless sequence of shuffled epochs.

    The returned function maps ``(start, count)`` to the rows at places start to start + count - 1
    of the concatenation of one permutation per epoch: every row is visited once per epoch, and a
    batch may cross into the next epoch.

    Raises:
        ValueError: ``rows`` is not positive.
    """
    if rows < 1:
        raise ValueError(f"cannot order {rows} rows; expected at least 1")

    @lru_cache(maxsize=2)
    def permutation(epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed * _EPOCH_STRIDE + epoch)
        return torch.randperm(rows, generator=generator).tolist()

    def stretch(start: int, count: int) -> list[int]:
        return [permutation(place // rows)[place % rows] for place in range(start, start + count)]

    return stretch
