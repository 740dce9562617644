"""Which examples share a forward pass: those of similar length, up to a number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def token_batches(
    lengths: NDArray[np.int64],
    batch_size: int,
    tokens_per_batch: int | None = None,
    image_tokens: NDArray[np.int64] | None = None,
) -> list[NDArray[np.int64]]:
    """Return the rows of every batch, the longest rows first.

    Rows are sorted by length, so that padding is short. A batch ends where a further row would make
    it more than ``batch_size`` rows, or more than ``tokens_per_batch`` tokens:

        rows · length of the longest + tokens of all images in the vision tower.

    A single row may have more. Without a row that large, the number of rows alone decides.

    Args:
        lengths: The tokens of each row.
        batch_size: The largest number of rows.
        tokens_per_batch: The largest number of tokens, None for any.
        image_tokens: The tokens of each row's images in the vision tower, None for none.
    """
    order = np.argsort(-lengths, kind="stable")
    if tokens_per_batch is None:
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    longest = lengths[order].tolist()
    images = [0] * len(order) if image_tokens is None else image_tokens[order].tolist()
    batches = []
    start = held = 0
    for row, tokens in enumerate(images):
        size = row + 1 - start
        if row > start and (
            size > batch_size or size * longest[start] + held + tokens > tokens_per_batch
        ):
            batches.append(order[start:row])
            start, held = row, 0
        held += tokens
    return [*batches, order[start:]] if len(order) else []


def vision_tokens_per_tile(config: Any) -> int:
    """Return how many tokens a tile, the unit of ``num_patches``, has in the vision tower.

    For towers of one image size they are its patches, for the Qwen2-VL kind the patches that become
    one token. 0 means a model without a tower.
    """
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return 0
    size, patch = (_product(getattr(vision, name, None)) for name in ("image_size", "patch_size"))
    if size and patch:
        return size // patch
    return int(getattr(vision, "spatial_merge_size", 2)) ** 2


def _product(value: Sequence[int] | int | None) -> int:
    """Return the area of a side, or of two."""
    if value is None:
        return 0
    return int(np.prod(value)) if isinstance(value, Sequence) else int(value) ** 2
