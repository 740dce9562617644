"""The choice of how images are prepared for a model, by the model's image processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from prm.inputs.patch_grid import PatchGrid
from prm.inputs.processor import ProcessedImages
from prm.inputs.tiles import CACHE_BYTES, ImageInputs, Tiler
from prm.inputs.tokens import ImageTokens, patch_tokens, processor_tokens, tile_tokens


def image_inputs(
    image_processor: Any, *, max_patches: int | None = None, cache_bytes: int = CACHE_BYTES
) -> ImageInputs:
    """Return the preparation of images for an image processor or a whole processor.

    It is a ``Tiler`` for InternVL, a ``PatchGrid`` for Qwen2-VL and ``ProcessedImages`` for a whole
    processor. ``max_patches`` does not affect the last, whose processor determines the size.

    Raises:
        ValueError: The image processor is of another kind, or ``max_patches`` is less than 1.
    """
    if _is_processor(image_processor):
        return ProcessedImages(image_processor, cache_bytes=cache_bytes)
    kind = PatchGrid if _makes_grids(image_processor) else Tiler
    return kind(image_processor, max_patches=max_patches, cache_bytes=cache_bytes)


def image_tokens(image_processor: Any, tokenizer: Any, config: Any) -> ImageTokens:
    """Return the tokens of an image for the kind of model that the image processor belongs to.

    Raises:
        ValueError: The tokenizer or the configuration does not name them, or the two disagree.
    """
    if _is_processor(image_processor):
        return processor_tokens(image_processor, config)
    if _makes_grids(image_processor):
        return patch_tokens(tokenizer, config)
    return tile_tokens(tokenizer, config)


def concatenated(values: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first axis, with shorter further axes padded with zeros."""
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = []
    for value in values:
        missing = [most - size for most, size in zip(shape, value.shape[1:], strict=True)]
        pad = [side for size in reversed(missing) for side in (0, size)]
        padded.append(functional.pad(value, pad) if any(missing) else value)
    return torch.cat(padded)


def row_owners(batch: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Return which example each row inside the vision tower belongs to.

    Inside the tower the leading axis runs over images or patches, not over examples.

    Args:
        batch: The batch, from a ``Collator``.

    Returns:
        The owners as ``{rows: owner [rows]}``, for every leading size in the tower: the number of
        tiles, and that of the rows of ``pixel_values`` if a tile has several (merged patches). It
        is empty for a batch without images.
    """
    if "pixel_values" not in batch:
        return {}
    tiles, pixels = batch["num_patches"], batch["pixel_values"]
    # The number of tiles, where there is a row for each: else the host would wait for the sum.
    count = len(pixels) if pixels.dim() == 4 else None
    numbers = torch.arange(len(tiles), device=tiles.device)
    owners = numbers.repeat_interleave(tiles, output_size=count)
    owner_of = {
        size: owners.repeat_interleave(size // len(owners)) for size in (len(owners), len(pixels))
    }
    if pixels.dim() == 5:  # [images, crops, channels, height, width]: models drop empty crops
        crops = pixels.flatten(2).any(-1).sum(-1)
        owner_of |= {
            len(owners) * pixels.shape[1]: owners.repeat_interleave(pixels.shape[1]),
            int(crops.sum()): owners.repeat_interleave(crops),
        }
    return owner_of


def _is_processor(image_processor: Any) -> bool:
    return hasattr(image_processor, "image_processor")


def _makes_grids(image_processor: Any) -> bool:
    return "image_grid_thw" in getattr(image_processor, "model_input_names", ())
