"""Images prepared by the model's own processor, for models without a module of their own here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prm.data_urls import picture_key
from prm.inputs import tiles as images
from prm.inputs.tiles import CACHE_BYTES, RecentImages, check_count
from prm.inputs.tokens import ImageTokens

_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


class ProcessedImages:
    """Takes an image's pixels and tokens from the processor of an image-text-to-text model.

    Images are decoded when examples are encoded, not only when they are batched. LLaVA, LLaVA-NeXT
    and Gemma 3 are tested; a model works if its images can be processed one by one and concatenated
    (padded with zeros where they differ in the number of crops, as processors do).

    Args:
        processor: A processor of transformers with an ``image_token``.
        cache_bytes: The limit of the cache of model inputs in bytes. 0 disables the cache.
    """

    def __init__(self, processor: Any, *, cache_bytes: int = CACHE_BYTES) -> None:
        if getattr(processor, "image_token", None) is None:
            raise ValueError(
                "expected a processor that names the token of an image (image_token), found "
                f"{type(processor).__name__}"
            )
        self.processor = processor
        self._cache = RecentImages(cache_bytes)
        self._counts: dict[str, int] = {}
        self._texts: dict[str, str] = {}

    def count(self, path: Path) -> int:
        """Return the number of rows of ``pixel_values`` that the image takes."""
        key = picture_key(path)
        if key not in self._counts:
            self.inputs(path)
        return self._counts[key]

    def expanded(self, path: Path, tokens: ImageTokens) -> str:
        """Return the text of the image's tokens."""
        key = picture_key(path)
        if key not in self._texts:
            self.inputs(path)
        return self._texts[key]

    def inputs(self, path: Path) -> Mapping[str, Tensor]:
        """Return the model inputs of an image, which are read-only.

        Raises:
            DataError: The file cannot be decoded, or has changed since it was counted.
        """
        return self._cache.get(path, self._read)

    def _read(self, path: Path) -> Mapping[str, Tensor]:
        processed = self.processor(
            images=[images.read_image(path)],
            text=[self.processor.image_token],
            return_tensors="pt",
            return_text_replacement_offsets=True,
        )
        (replacement,) = processed.pop("text_replacement_offsets")[0]
        rows = len(processed["pixel_values"])
        check_count(path, self._counts.setdefault(picture_key(path), rows), rows)
        self._texts.setdefault(picture_key(path), replacement["replacement"])
        return {
            name: torch.as_tensor(value) for name, value in processed.items() if name not in _TEXT
        }
