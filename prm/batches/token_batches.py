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
    *,
    examples: NDArray[np.int64] | None = None,
    most_pairs: int | None = None,
) -> list[NDArray[np.int64]]:
    """Return the rows of every batch, the longest rows first.

    Rows are sorted by length, so that padding is short. A batch ends where a further row would make
    it more than ``batch_size`` examples, or more than ``tokens_per_batch`` tokens:

        rows · length of the longest + tokens of all images in the vision tower.

    A single row may have more. Without a row that large, the number of examples alone decides.

    Args:
        lengths: The tokens of each row.
        batch_size: The largest number of examples.
        tokens_per_batch: The largest number of tokens, None for any.
        image_tokens: The tokens of each row's images in the vision tower, None for none.
        examples: The examples of each row, None for one each.
        most_pairs: The largest number of pairs of tokens, rows · (length of the longest)², of rows
            that have masks; None for any.
    """
    order = np.argsort(-lengths, kind="stable")
    longest = lengths[order].tolist()
    images = [0] * len(order) if image_tokens is None else image_tokens[order].tolist()
    counts = [1] * len(order) if examples is None else examples[order].tolist()
    batches = []
    start = held = size = 0
    for row, (tokens, count) in enumerate(zip(images, counts, strict=True)):
        rows = row + 1 - start
        if row > start and (
            size + count > batch_size
            or _more(rows * longest[start] + held + tokens, tokens_per_batch)
            or _more(rows * longest[start] ** 2, most_pairs)
        ):
            batches.append(order[start:row])
            start, held, size = row, 0, 0
        held += tokens
        size += count
    return [*batches, order[start:]] if len(order) else []


def _more(number: int, limit: int | None) -> bool:
    return limit is not None and number > limit


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
