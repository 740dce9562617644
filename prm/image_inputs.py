"""Which way of preparing images belongs to a model, told by its image processor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prm.images import CACHE_BYTES, ImageInputs, Tiler
from prm.patch_grid import PatchGrid
from prm.tokens import ImageTokens, patch_tokens, tile_tokens


def image_inputs(
    image_processor: Any, *, max_patches: int | None = None, cache_bytes: int = CACHE_BYTES
) -> ImageInputs:
    """``Tiler`` (InternVL) or ``PatchGrid`` (Qwen2-VL and its successors).

    Raises:
        ValueError: none of them fits, or max_patches is less than 1.
    """
    kind = PatchGrid if _makes_grids(image_processor) else Tiler
    return kind(image_processor, max_patches=max_patches, cache_bytes=cache_bytes)


def image_tokens(image_processor: Any, tokenizer: Any, config: Any) -> ImageTokens:
    """The tokens of an image for the kind of model that the image processor belongs to.

    Raises:
        ValueError: tokenizer or configuration do not name them, or do not agree.
    """
    if _makes_grids(image_processor):
        return patch_tokens(tokenizer, config)
    return tile_tokens(tokenizer, config)


def row_owners(batch: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Which example each row inside the vision tower belongs to: there images lead, not examples.

    Args:
        batch: of ``Collator``.

    Returns:
        ``{rows: owner [rows]}`` for every number of rows that the tower works with: tiles, and
        where ``pixel_values`` has several rows per tile (patches that are merged), these too.
        Empty for a batch without images.
    """
    if "pixel_values" not in batch:
        return {}
    tiles, pixels = batch["num_patches"], batch["pixel_values"]
    owners = torch.arange(len(tiles), device=tiles.device).repeat_interleave(tiles)
    sizes = {len(owners), len(pixels)}
    if pixels.dim() == 5:  # [images, tiles, channels, height, width], flattened inside
        sizes.add(pixels.shape[0] * pixels.shape[1])
    return {size: owners.repeat_interleave(size // len(owners)) for size in sizes}


def _makes_grids(image_processor: Any) -> bool:
    return "image_grid_thw" in getattr(image_processor, "model_input_names", ())
