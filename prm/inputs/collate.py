"""Collate examples into batches: encode each once, then pad tokens and read images per batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from prm.inputs.image_inputs import concatenated
from prm.inputs.layout import Layout
from prm.inputs.prompt import PromptEncoder
from prm.inputs.tiles import ImageInputs
from prm.schema import DataError, StepExample

Batch = dict[str, Tensor]
TREE_POSITIONS = "tree_positions"
"""The label positions of a batch whose rows are trees (``prm.batches.prefix_trees``)."""
_AT_ONCE = 256


@dataclass(frozen=True, eq=False, slots=True)
class EncodedExample:
    """A tokenised example with the paths, not the pixels, of its images.

    Attributes:
        example: The example, with the steps alone that are encoded.
        input_ids: The token ids [seq] up to the last label position, image tokens included.
        label_positions: The positions [steps] whose logits predict the labels.
        tile_counts: The number of tiles of each image.
    """

    example: StepExample
    input_ids: Int32[Tensor, " seq"]
    label_positions: Int64[Tensor, " steps"]
    tile_counts: tuple[int, ...]


class Collator:
    """Turns examples into batches for one tokenizer and image processor.

    ``encode`` tokenises an example; keep the result over epochs. Calling the collator pads. A list
    of encoded examples is a data set::

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

    ``PRM.collator`` builds one for a model.

    Args:
        prompt: The encoder of examples into tokens. Its tokenizer has a padding token.
        images: The preparation of images (``prm.inputs.image_inputs``). None means text only, and
            ``prompt.image_tokens`` is then None, too.
        token_types: The name of the model input that marks the tokens of an image. None means that
            the model has none.
        index: The row of every example id in the table of instance weights. An id that is missing
            is an error. None means that batches hold no ``index``.
        domains: The number of every domain. A domain that is missing is an error. None means that
            batches hold no ``domain``.

    Raises:
        ValueError: The tokenizer has no padding token, or only one of ``images`` and
            ``prompt.image_tokens`` is given.
    """

    def __init__(
        self,
        prompt: PromptEncoder,
        images: ImageInputs | None = None,
        *,
        token_types: str | None = None,
        index: Mapping[str, int] | None = None,
        domains: Mapping[str, int] | None = None,
    ) -> None:
        if (images is None) != (prompt.image_tokens is None):
            raise ValueError("give both images and a prompt with image_tokens, or none of them")
        if prompt.tokenizer.pad_token_id is None:
            raise ValueError(
                "expected a tokenizer with a padding token, found none; set tokenizer.pad_token"
            )
        self.prompt = prompt
        self.images = images
        self.token_types = token_types
        self.index = index
        self.domains = domains

    def with_rows(
        self, index: Mapping[str, int] | None, domains: Mapping[str, int] | None = None
    ) -> Collator:
        """Return a collator with these rows and the same prompt, images and cache."""
        return Collator(
            self.prompt,
            self.images,
            token_types=self.token_types,
            index=index,
            domains=domains,
        )

    def encode(self, example: StepExample) -> EncodedExample:
        """Tokenise ``example``, reading only the headers of its images.

        Raises:
            DataError: An image file is missing or not an image, or the text cannot be laid out.
        """
        (result,) = self.encode_many([example])
        if isinstance(result, DataError):
            raise result
        return result

    def encode_many(self, examples: Iterable[StepExample]) -> Iterator[EncodedExample | DataError]:
        """Yield what ``encode`` returns of every example, or the ``DataError`` that it raises.

        The examples are tokenised together, which takes less time.
        """
        coming = iter(examples)
        while chunk := list(islice(coming, _AT_ONCE)):
            images = list(map(self._expanded, chunk))
            readable = [
                (example, found[1])
                for example, found in zip(chunk, images, strict=True)
                if not isinstance(found, DataError)
            ]
            encoded = iter(
                self.prompt.encode_many([row[0] for row in readable], [row[1] for row in readable])
            )
            for example, found in zip(chunk, images, strict=True):
                if isinstance(found, DataError):
                    yield found
                elif isinstance(result := next(encoded), DataError):
                    yield result
                else:
                    kept = len(result[1])
                    if kept < len(example.steps):
                        example = replace(example, steps=example.steps[:kept])
                    yield EncodedExample(example, *result, found[0])

    def check(self, examples: Sequence[StepExample]) -> list[DataError | int | None]:
        """Return what ``encode`` makes of every example: None if it encodes all of it.

        Otherwise it is the ``DataError`` that it raises, or with ``too_long`` "truncate" the number
        of first steps that it encodes of one that is too long. Images are read by their headers, as
        by ``encode``. Most texts are not tokenised; see ``prm.inputs.layout``.
        """
        faults: list[DataError | int | None] = []
        unsure: dict[int, StepExample] = {}
        for number, example in enumerate(examples):
            images = self._expanded(example)
            faults.append(images if isinstance(images, DataError) else None)
            if not (isinstance(images, DataError) or self._layout.fits(example, images[1])):
                unsure[number] = example
        for number, result in zip(unsure, self.encode_many(unsure.values()), strict=True):
            if isinstance(result, DataError):
                faults[number] = result
            elif len(result.example.steps) < len(unsure[number].steps):
                faults[number] = len(result.example.steps)
        return faults

    @cached_property
    def _layout(self) -> Layout:
        return Layout(self.prompt)

    def _expanded(self, example: StepExample) -> tuple[tuple[int, ...], Sequence[str]] | DataError:
        """Return the number of tiles and the text of the tokens of each image."""
        tokens = self.prompt.image_tokens
        try:
            if self.images is None or tokens is None:
                if example.images:
                    self.prompt.messages(example)  # Raises: the model takes no images.
                return (), ()
            counts = tuple(map(self.images.count, example.images))
            return counts, [self.images.expanded(path, tokens) for path in example.images]
        except DataError as error:
            return error

    def __call__(self, rows: Sequence[EncodedExample | StepExample]) -> Batch:
        """Pad ``rows`` into a batch; examples that are not encoded yet are encoded first.

        Raises:
            DataError: An image cannot be decoded, or an id or domain is not in the index.
        """
        if not rows:
            raise ValueError("expected at least one example in a batch, found none")
        encoded = [row if isinstance(row, EncodedExample) else self.encode(row) for row in rows]
        return self.sequences(encoded) | self.targets(encoded)

    def sequences(self, encoded: Sequence[EncodedExample]) -> Batch:
        """Return what a model reads: the entries of a batch of tokens, pictures and positions.

        Raises:
            DataError: An image cannot be decoded.
        """
        # Padding is on the right: left padding has attention rows without any key, for which eager
        # attention returns NaN in float64. A causal model ignores what follows a sequence.
        lengths = torch.tensor([len(row.input_ids) for row in encoded])
        seq = int(lengths.max())
        steps = _most_steps(encoded)
        input_ids = torch.full((len(encoded), seq), self.prompt.tokenizer.pad_token_id)
        label_positions = torch.zeros(len(encoded), steps, dtype=torch.long)
        for number, row in enumerate(encoded):
            input_ids[number, : len(row.input_ids)] = row.input_ids
            label_positions[number, : len(row.label_positions)] = row.label_positions
        batch = {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(seq) < lengths[:, None]).long(),
            "label_positions": label_positions,
            "num_patches": torch.tensor([sum(row.tile_counts) for row in encoded]),
        }
        if self.token_types is not None and self.prompt.image_tokens is not None:
            batch[self.token_types] = self.prompt.image_tokens.in_images(input_ids)
        return batch | self._images(encoded)

    def targets(self, encoded: Sequence[EncodedExample]) -> Batch:
        """Return what the losses read: the entries of a batch of steps, outcomes and numbers.

        Raises:
            DataError: An id or domain is not in the index.
        """
        counts = torch.tensor([len(row.label_positions) for row in encoded])
        batch = {"step_mask": torch.arange(_most_steps(encoded)) < counts[:, None]}
        batch |= _targets([row.example for row in encoded])
        if self.index is not None:
            batch["index"] = torch.tensor([self._row(row.example) for row in encoded])
        if self.domains is not None:
            batch["domain"] = torch.tensor([self._domain(row.example) for row in encoded])
        return batch

    def _images(self, encoded: Sequence[EncodedExample]) -> Batch:
        if self.images is None:
            return {}
        read: dict[Path, Mapping[str, Tensor]] = {}  # Read once even if the cache is full.
        parts: dict[str, list[Tensor]] = {}
        for row in encoded:
            for image, count in zip(row.example.images, row.tile_counts, strict=True):
                if self.images.count(image) != count:
                    raise DataError(
                        expected=f"{count} tiles, as when the example was encoded",
                        found=f"{self.images.count(image)}",
                        file=image,
                        example=row.example.id,
                        remedy="encode with the collator that collates",
                    )
                if image not in read:
                    read[image] = self.images.inputs(image)
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


def _most_steps(encoded: Sequence[EncodedExample]) -> int:
    return max(len(row.label_positions) for row in encoded)


def _targets(examples: Sequence[StepExample]) -> Batch:
    steps = max(len(example.steps) for example in examples)
    labels = torch.full((len(examples), steps), math.nan)
    for number, example in enumerate(examples):
        known = [math.nan if step.label is None else step.label for step in example.steps]
        labels[number, : len(known)] = torch.tensor(known)
    correct = [math.nan if example.correct is None else example.correct for example in examples]
    return {"labels": labels, "correct": torch.tensor(correct, dtype=torch.float32)}
