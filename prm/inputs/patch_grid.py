"""Images as grids of patches, whose number depends on the image's size, as for Qwen2-VL."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prm.data_urls import picture_key
from prm.inputs import tiles as images
from prm.inputs.tiles import CACHE_BYTES, RecentImages, check_count, check_max_patches, image_size
from prm.inputs.tokens import ImageTokens
from prm.schema import DataError

TILE_PIXELS = 448 * 448
"""Pixels per unit of ``max_patches``: those of an InternVL tile, which has 256 tokens as here."""


class PatchGrid:
    """Cuts images into patches with the image processor of Qwen2-VL, Qwen2.5-VL or Qwen3-VL.

    An image is resized with its aspect ratio kept, so that both sides are multiples of a merged
    patch (28 pixels for Qwen2-VL) and the number of pixels is within the processor's bounds. A
    merged patch (2 x 2 patches) is one token of the text and counts as one tile.

    Args:
        image_processor: The image processor, which returns ``pixel_values`` [patches, values] and
            ``image_grid_thw`` [images, 3].
        max_patches: The largest number of pixels per image in units of 448 x 448 (256 tokens), so
            that it limits the sequence as it does for InternVL. None means the processor's bound.
        cache_bytes: The limit of the cache of patches in bytes. 0 disables the cache.
    """

    def __init__(
        self,
        image_processor: Any,
        *,
        max_patches: int | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if "image_grid_thw" not in getattr(image_processor, "model_input_names", ()):
            raise ValueError(
                "expected an image processor that makes a grid of patches (image_grid_thw), such "
                f"as the one of Qwen2-VL checkpoints; found {type(image_processor).__name__}"
            )
        check_max_patches(max_patches)
        self.image_processor = image_processor
        least, most = (image_processor.size[f"{edge}_edge"] for edge in ("shortest", "longest"))
        if max_patches is not None:
            most = max_patches * TILE_PIXELS
        self._pixels = min(least, most), most
        self._cache = RecentImages(cache_bytes)
        self._counts: dict[str, int] = {}

    def count(self, path: Path) -> int:
        """Return the number of merged patches of ``path``, from the file's header.

        Raises:
            DataError: The file is missing or not an image, or one side is more than 200 times the
                other.
        """
        key = picture_key(path)
        if key not in self._counts:
            least, most = self._pixels
            height, width = image_size(path)
            try:
                patches = self.image_processor.get_number_of_image_patches(
                    height, width, {"min_pixels": least, "max_pixels": most}
                )
            except ValueError as error:
                raise DataError(
                    expected="an image that the image processor can resize",
                    found=f"{width} x {height} pixels ({error})",
                    file=path,
                    remedy="crop or pad the image",
                ) from error
            self._counts[key] = patches // self.image_processor.merge_size**2
        return self._counts[key]

    def expanded(self, path: Path, tokens: ImageTokens) -> str:
        """Return the text of the image's tokens."""
        return tokens.expanded(self.count(path))

    def inputs(self, path: Path) -> Mapping[str, Tensor]:
        """Return ``pixel_values`` [patches, values] and ``image_grid_thw`` [1, 3], both read-only.

        Raises:
            DataError: The file cannot be decoded, or has changed since it was counted.
        """
        return self._cache.get(path, self._read)

    def _read(self, path: Path) -> Mapping[str, Tensor]:
        least, most = self._pixels
        processed = self.image_processor(
            [images.read_image(path)],
            return_tensors="pt",
            size={"shortest_edge": least, "longest_edge": most},
        )
        grid = torch.as_tensor(processed["image_grid_thw"])
        check_count(path, self.count(path), int(grid.prod()) // self.image_processor.merge_size**2)
        return {"pixel_values": torch.as_tensor(processed["pixel_values"]), "image_grid_thw": grid}
