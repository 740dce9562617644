"""The special tokens of a vocabulary: those of the two labels and those of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class LabelTokens:
    """Token ids of the two labels."""

    plus_id: int
    minus_id: int


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of an image: ``start``, then ``per_tile`` x tiles ``context``, then ``end``.

    Before expansion, each image of a conversation is represented by one ``context``.

    Attributes:
        start: The special token before an image, or "".
        end: The special token after an image, or "".
        context: The special token that represents an image before expansion and, if ``per_tile`` is
            not 0, the token that the model replaces by image features.
        context_id: The id of the token that the model replaces by image features.
        per_tile: The number of context tokens per tile: 256 for InternVL3, 1 for Qwen2-VL, whose
            tiles are its merged patches. 0 means that the model's processor expands images.
        separator: The text that the model's own template places after an image.
        others: Further tokens that ordinary text must not contain.
        part_ids: The ids of the tokens of an image, for models that take token types. Empty means
            ``context_id`` alone.
    """

    start: str
    end: str
    context: str
    context_id: int
    per_tile: int
    separator: str = "\n"
    others: tuple[str, ...] = ()
    part_ids: tuple[int, ...] = ()

    def expanded(self, tiles: int) -> str:
        """Return the text of the tokens of an image with this number of tiles."""
        return f"{self.start}{self.context * (self.per_tile * tiles)}{self.end}"

    def in_images(self, input_ids: Int[Tensor, "*batch seq"]) -> Int[Tensor, "*batch seq"]:
        """Return 1 where a token is part of an image, else 0, in the shape of ``input_ids``."""
        parts = input_ids.new_tensor(self.part_ids or (self.context_id,))
        return torch.isin(input_ids, parts).to(input_ids.dtype)

    @property
    def reserved(self) -> frozenset[str]:
        """Return the tokens that ordinary text must not contain."""
        return frozenset({self.start, self.end, self.context, *self.others} - {""})


def label_tokens(tokenizer: Any) -> LabelTokens:
    """Return the ids of "+" and "-".

    Raises:
        ValueError: One of them is not exactly one known token.
    """
    ids = []
    for label in "+-":
        tokens = tokenizer.encode(label, add_special_tokens=False)
        if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"expected {label!r} to be one token of the tokenizer, found {tokens}; "
                "choose a tokenizer that has it, or add the token and resize the embeddings"
            )
        ids.append(tokens[0])
    return LabelTokens(*ids)


def tile_tokens(tokenizer: Any, config: Any) -> ImageTokens:
    """Return the tokens of an image for InternVL, by the names that its processor uses.

    Raises:
        ValueError: The tokenizer or the configuration does not name them, or the two disagree.
    """
    names = ("start_image_token", "end_image_token", "context_image_token")
    missing = [name for name in names if getattr(tokenizer, name, None) is None]
    if missing or not hasattr(config, "image_seq_length"):
        raise ValueError(
            f"expected a tokenizer with {', '.join(names)} and a configuration with "
            f"image_seq_length, as InternVL's '-hf' checkpoints have; "
            f"missing: {', '.join(missing) or 'image_seq_length'}"
        )
    start, end, context = (getattr(tokenizer, name) for name in names)
    context_id = tokenizer.convert_tokens_to_ids(context)
    if context_id != config.image_token_id:
        raise ValueError(
            f"expected {context!r} to have the configuration's image_token_id "
            f"{config.image_token_id}, found {context_id}; tokenizer and model do not belong "
            "together"
        )
    return ImageTokens(start, end, context, context_id, config.image_seq_length)


def patch_tokens(tokenizer: Any, config: Any) -> ImageTokens:
    """Return the tokens of an image for the Qwen2-VL kind, by the ids in its configuration.

    Raises:
        ValueError: The configuration does not name them, or the tokenizer does not have them.
    """
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id")
    ids = [getattr(config, name, None) for name in names]
    special = tokenizer.added_tokens_decoder
    unknown = [
        f"{name} {token}" for name, token in zip(names, ids, strict=True) if token not in special
    ]
    if unknown:
        raise ValueError(
            "expected special tokens of the tokenizer for the configuration's "
            f"{', '.join(names)}, found none for {', '.join(unknown)}; tokenizer and model do not "
            "belong together"
        )
    start, end, context = (special[token].content for token in ids)
    return ImageTokens(start, end, context, config.image_token_id, 1, separator="")


def processor_tokens(processor: Any, config: Any) -> ImageTokens:
    """Return the tokens of an image for a model whose processor expands images itself."""
    tokenizer = processor.tokenizer
    context_id = getattr(config, "image_token_id", None)
    if context_id is None:
        context_id = tokenizer.convert_tokens_to_ids(processor.image_token)
    part_ids = tuple(token for token in processor.image_token_ids if token is not None)
    others = tokenizer.convert_ids_to_tokens([context_id, *part_ids])
    return ImageTokens(
        "", "", processor.image_token, context_id, 0, others=tuple(others), part_ids=part_ids
    )
