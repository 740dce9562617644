"""The special places of a vocabulary: the two labels, and what an image stands for in the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LabelTokens:
    """Token ids of the two labels."""

    plus_id: int
    minus_id: int


@dataclass(frozen=True)
class ImageTokens:
    """How an image stands in the text: ``start``, then ``per_tile`` x tiles ``context``, ``end``.

    The texts are those of special tokens; ``*_id`` are their ids.
    """

    start: str
    end: str
    context: str
    start_id: int
    end_id: int
    context_id: int
    per_tile: int


def label_tokens(tokenizer: Any) -> LabelTokens:
    """Ids of "+" and "-".

    Raises:
        ValueError: one of them is not exactly one known token.
    """
    ids = []
    for label in "+-":
        found = tokenizer.encode(label, add_special_tokens=False)
        if len(found) != 1 or found[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"expected {label!r} to be one token of the tokenizer, found {found}; "
                "choose a tokenizer that has it, or add the token and resize the embeddings"
            )
        ids.append(found[0])
    return LabelTokens(*ids)


def image_tokens(tokenizer: Any, config: Any) -> ImageTokens:
    """The tokens of an image, by the names that InternVL's processor uses.

    Raises:
        ValueError: tokenizer or configuration do not name them, or do not agree.
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
    start_id, end_id, context_id = tokenizer.convert_tokens_to_ids([start, end, context])
    if context_id != config.image_token_id:
        raise ValueError(
            f"expected {context!r} to have the configuration's image_token_id "
            f"{config.image_token_id}, found {context_id}; tokenizer and model do not belong "
            "together"
        )
    return ImageTokens(start, end, context, start_id, end_id, context_id, config.image_seq_length)
