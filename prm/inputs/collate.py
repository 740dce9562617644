"""Examples to batches: encode each example once, then pad tokens and gather tiles per batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prm.inputs.image_inputs import concatenated, image_inputs
from prm.inputs.prompt import SYSTEM_PROMPT, PromptEncoder
from prm.inputs.tiles import CACHE_BYTES
from prm.inputs.tokens import ImageTokens
from prm.names import Context
from prm.schema import DataError, StepExample

Batch = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class EncodedExample:
    """An example, tokenised. Images are named, not held.

    Attributes:
        example: What was encoded.
        input_ids: [seq] int32, images written out.
        label_positions: [steps] long.
        tile_counts: Tiles per image.
    """

    example: StepExample
    input_ids: Tensor
    label_positions: Tensor
    tile_counts: tuple[int, ...]


class Collator:
    """Turns examples into batches for one tokenizer and image processor.

    ``encode`` tokenises once (keep the result over epochs); calling the collator pads. A list of
    encoded examples is a data set::

        encoded = [collator.encode(example) for example in read_jsonl("train.jsonl")]
        loader = DataLoader(encoded, batch_size=8, shuffle=True, collate_fn=collator)

    A batch holds, with its rows in the order of the examples:

    ==================  ========================  ================================================
    ``input_ids``       [batch, seq] long
    ``attention_mask``  [batch, seq] long
    ``pixel_values``    [tiles, C, H, W] float32  tiles of all rows in order; absent without images
                        or [patches, values]      (patches: for the Qwen2-VL kind)
    ``image_grid_thw``  [images, 3] long          patches per axis; only for the Qwen2-VL kind
    ``mm_token_type_ids`` [batch, seq] long       1 where a token is part of an image; only if the
                                                  model asks for it
    ``num_patches``     [batch] long              tiles of each row (0: text only)
    ``label_positions`` [batch, steps] long       position whose logits predict the label; 0 padded
    ``step_mask``       [batch, steps] bool       True where there is a step
    ``labels``          [batch, steps] float32    NaN where there is no label or no step
    ``correct``         [batch] float32           1, 0, or NaN where unknown
    ``index``           [batch] long              only with ``index``
    ``domain``          [batch] long              only with ``domains``
    ==================  ========================  ================================================

    Args:
        tokenizer: Fast, with a chat template and a padding token.
        image_processor: Image processor, or whole processor, of the model
            (``prm.inputs.image_inputs``); None: text only.
        image_tokens: How images stand in the text; None: text only.
        context: What stands in earlier assistant slots (``prm.inputs.prompt.Context``).
        system_prompt: Text of the system turn; None: no system turn.
        max_patches: Most tiles per image, thumbnail apart, in units of 256 tokens; None: the image
            processor's number.
        max_length: Longest sequence that is accepted; None: any.
        index: Row of every example id in the table of instance weights; an id that it does not
            hold is an error.
        domains: Number of every domain; a domain that it does not hold is an error.
        cache_bytes: Limit of the cache of image inputs.
        token_types: Name of the model input that says which tokens are part of an image; None: the
            model has none.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any = None,
        image_tokens: ImageTokens | None = None,
        *,
        context: Context = "plus",
        system_prompt: str | None = SYSTEM_PROMPT,
        max_patches: int | None = None,
        max_length: int | None = None,
        index: Mapping[str, int] | None = None,
        domains: Mapping[str, int] | None = None,
        cache_bytes: int = CACHE_BYTES,
        token_types: str | None = None,
    ) -> None:
        if (image_processor is None) != (image_tokens is None):
            raise ValueError("give both image_processor and image_tokens, or none of them")
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "expected a tokenizer with a padding token, found none; set tokenizer.pad_token"
            )
        self.prompt = PromptEncoder(
            tokenizer,
            image_tokens=image_tokens,
            context=context,
            system_prompt=system_prompt,
            max_length=max_length,
            chat_template=getattr(image_processor, "chat_template", None),
        )
        self.tiler = (
            None
            if image_processor is None
            else image_inputs(image_processor, max_patches=max_patches, cache_bytes=cache_bytes)
        )
        self.image_tokens = image_tokens
        self.token_types = token_types
        self.index = index
        self.domains = domains

    def encode(self, example: StepExample) -> EncodedExample:
        """Tokenise ``example``; of its images only the headers are read.

        Raises:
            DataError: An image is missing or no image, or the text cannot be laid out.
        """
        if self.tiler is None or self.image_tokens is None:
            if example.images:
                self.prompt.messages(example)  # raises: the model takes no images
            return EncodedExample(example, *self.prompt.encode(example), ())
        counts = tuple(map(self.tiler.count, example.images))
        pictures = [self.tiler.expanded(path, self.image_tokens) for path in example.images]
        return EncodedExample(example, *self.prompt.encode(example, pictures), counts)

    def __call__(self, rows: Sequence[EncodedExample | StepExample]) -> Batch:
        """Pad ``rows`` into a batch; examples that are not encoded yet are encoded first.

        Raises:
            DataError: An image cannot be decoded, or an id or domain is not in the index.
        """
        if not rows:
            raise ValueError("expected at least one example in a batch, found none")
        encoded = [row if isinstance(row, EncodedExample) else self.encode(row) for row in rows]
        batch = self._tokens(encoded)
        batch["num_patches"] = torch.tensor([sum(row.tile_counts) for row in encoded])
        batch.update(_targets([row.example for row in encoded]))
        batch.update(self._images(encoded))
        if self.index is not None:
            batch["index"] = torch.tensor([self._row(row.example) for row in encoded])
        if self.domains is not None:
            batch["domain"] = torch.tensor([self._domain(row.example) for row in encoded])
        return batch

    def _tokens(self, encoded: Sequence[EncodedExample]) -> Batch:
        # Padding goes to the right: rows of only padding before a sequence make eager attention
        # return NaN in float64, and a causal model reads nothing behind a sequence anyway.
        lengths = torch.tensor([len(row.input_ids) for row in encoded])
        seq = int(lengths.max())
        steps = max(len(row.label_positions) for row in encoded)
        input_ids = torch.full((len(encoded), seq), self.prompt.tokenizer.pad_token_id)
        label_positions = torch.zeros(len(encoded), steps, dtype=torch.long)
        for place, row in enumerate(encoded):
            input_ids[place, : len(row.input_ids)] = row.input_ids
            label_positions[place, : len(row.label_positions)] = row.label_positions
        counts = torch.tensor([len(row.label_positions) for row in encoded])
        batch = {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(seq) < lengths[:, None]).long(),
            "label_positions": label_positions,
            "step_mask": torch.arange(steps) < counts[:, None],
        }
        if self.token_types is not None and self.image_tokens is not None:
            batch[self.token_types] = self.image_tokens.in_images(input_ids)
        return batch

    def _images(self, encoded: Sequence[EncodedExample]) -> Batch:
        if self.tiler is None:
            return {}
        read: dict[Path, Mapping[str, Tensor]] = {}  # also where the cache is too small
        parts: dict[str, list[Tensor]] = {}
        for row in encoded:
            for image, count in zip(row.example.images, row.tile_counts, strict=True):
                if self.tiler.count(image) != count:
                    raise DataError(
                        expected=f"{count} tiles, as when the example was encoded",
                        found=f"{self.tiler.count(image)}",
                        file=image,
                        example=row.example.id,
                        remedy="encode with the collator that collates",
                    )
                if image not in read:
                    read[image] = self.tiler.inputs(image)
                for name, value in read[image].items():
                    parts.setdefault(name, []).append(value)
        return {name: concatenated(values) for name, values in parts.items()}

    def _row(self, example: StepExample) -> int:
        assert self.index is not None
        if example.id not in self.index:
            raise DataError(
                expected=f"one of the {len(self.index)} ids that have a row",
                found=repr(example.id),
                field="id",
                remedy="build the index from the same examples",
            )
        return self.index[example.id]

    def _domain(self, example: StepExample) -> int:
        assert self.domains is not None
        if example.domain is None or example.domain not in self.domains:
            raise DataError(
                expected=f"a domain among {', '.join(map(repr, self.domains))}",
                found=repr(example.domain),
                example=example.id,
                field="domain",
                remedy="give every example of the file a domain that the index holds",
            )
        return self.domains[example.domain]


def _targets(examples: Sequence[StepExample]) -> Batch:
    steps = max(len(example.steps) for example in examples)
    labels = torch.full((len(examples), steps), math.nan)
    for place, example in enumerate(examples):
        known = [math.nan if step.label is None else step.label for step in example.steps]
        labels[place, : len(known)] = torch.tensor(known)
    correct = [math.nan if example.correct is None else example.correct for example in examples]
    return {"labels": labels, "correct": torch.tensor(correct, dtype=torch.float32)}
