"""Batches that hold the activations at the boundary of what is trained, instead of recomputing.

The frozen front of a model (``prm.models.boundary``) is computed for one example at a time, without
padding, and looked up by the content of what it reads: the tokens and pictures of an example, or
its pictures alone. Hence no key can be out of date, and the bits do not depend on the other rows of
a batch, on what is kept, or on where. They are those of a pass that computes the front of the whole
batch if the batch has one row; with several, products of other shapes round in another way.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prm.activations.stores import Store
from prm.batches.transfer import moved
from prm.inputs.collate import Batch
from prm.models.boundary import FROZEN_STATES, Boundary, frozen_states
from prm.models.model import PRM, TOKEN_TYPES, body_autocast, step_logits
from prm.tensor_cache import digest_tensors

_TEXT = ("input_ids", "attention_mask", *TOKEN_TYPES)
_PICTURES = ("pixel_values", "image_grid_thw")


@dataclass(frozen=True, eq=False)
class FrozenFront:
    """The frozen front of a model, and the store of what it computed.

    Attributes:
        prm: The model, with ``boundary`` set.
        store: Where activations are kept.
    """

    prm: PRM
    store: Store

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with ``frozen_states`` of its rows, for ``step_logits``.

        With the boundary behind layers these are [batch, seq, hidden], padded with zeros where the
        tokens are, and the batch has no pixels any more. Otherwise they are the features of all
        pictures in order; a batch without pictures is returned as it is. Cost: a forward pass of
        the front for each row that is not kept. They are on the CPU, as the batch is.

        Raises:
            ValueError: The model takes an input that cannot be divided among the rows.
        """
        rows = self.inputs(batch)
        found = [self._states(inputs) for inputs in rows if inputs]
        if not found:
            return batch
        if self._boundary.place != "layers":
            return {**batch, FROZEN_STATES: torch.cat(found)}
        seq = batch["input_ids"].shape[1]
        states = found[0].new_zeros(len(rows), seq, found[0].shape[-1])
        for padded, row in zip(states, found, strict=True):
            padded[: len(row)] = row
        kept = {name: value for name, value in batch.items() if name != "pixel_values"}
        return {**kept, FROZEN_STATES: states}

    def inputs(self, batch: Batch) -> list[dict[str, Tensor]]:
        """Return what the front reads of every row, without padding; of no picture, nothing.

        Raises:
            ValueError: The model takes an input that cannot be divided among the rows.
        """
        if not batch:
            return []
        accepted = inspect.signature(self.prm.model.base_model.forward).parameters
        others = accepted.keys() & batch.keys() - {*_TEXT, *_PICTURES, "labels"}
        if others:
            raise ValueError(
                f"expected a model whose inputs are tokens, pixels and grids, found one that takes "
                f"{', '.join(sorted(others))}, which cannot be divided among the rows of a batch"
            )
        pictures = _pictures(batch)
        if self._boundary.place != "layers":
            return pictures
        size, seq = batch["input_ids"].shape
        lengths = [seq] * size
        if "attention_mask" in batch:
            lengths = batch["attention_mask"].sum(1).tolist()
        text = [name for name in _TEXT if name in batch and name in accepted]
        return [
            {name: batch[name][row : row + 1, :length] for name in text} | pictures[row]
            for row, length in enumerate(lengths)
        ]

    def check(self, batch: Batch) -> None:
        """Compare the scores of the first row with and without its kept activations, bit for bit.

        Raises:
            ValueError: They differ: the model does something else before the boundary, too.
        """
        row, device = self._first_row(batch), self.prm.device
        with torch.no_grad():
            expected = step_logits(self.prm, {}, moved(row, device))
            try:
                found = step_logits(self.prm, {}, moved(self(row), device))
            except (AttributeError, TypeError):  # It reads more than a last hidden state.
                found = torch.full_like(expected, torch.nan)
        if not torch.equal(found, expected):
            raise ValueError(
                f"expected a model that goes on from the output of {self._boundary} alone with the "
                f"same bits, found that {type(self.prm.model).__name__} does not"
            )

    @property
    def _boundary(self) -> Boundary:
        assert self.prm.boundary is not None
        return self.prm.boundary

    def _first_row(self, batch: Batch) -> Batch:
        length = int(batch["attention_mask"][0].sum())
        row = {name: value[:1] for name, value in batch.items() if name not in _PICTURES}
        row |= {name: row[name][:, :length] for name in _TEXT if name in row}
        return row | _pictures(batch)[0]

    def _states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return h of one row: [seq, hidden], or the features of its pictures."""
        key = digest_tensors(inputs)
        found = self.store.get(key)
        if found is None:
            prm = self.prm
            with body_autocast(prm.model, prm.autocast):
                found = frozen_states(prm.model, self._boundary, moved(dict(inputs), prm.device))
            found = (found[0] if self._boundary.place == "layers" else found).cpu()
            self.store.put(key, found)
        return found


def _pictures(batch: Batch) -> list[dict[str, Tensor]]:
    """Return the inputs of the pictures of every row, empty for a row without any."""
    size = len(batch["input_ids"])
    if "pixel_values" not in batch:
        return [{} for _ in range(size)]
    pixels, tiles = batch["pixel_values"], batch["num_patches"]
    ends = (tiles.cumsum(0) * (len(pixels) // int(tiles.sum()))).tolist()
    starts = [0, *ends[:-1]]
    rows = [
        {"pixel_values": pixels[start:end]} if end > start else {}
        for start, end in zip(starts, ends, strict=True)
    ]
    if "image_grid_thw" in batch:
        grids = batch["image_grid_thw"]
        first = grids.prod(-1).cumsum(0) - grids.prod(-1)  # The first pixel row of every picture.
        for row, start, end in zip(rows, starts, ends, strict=True):
            if row:
                row["image_grid_thw"] = grids[(first >= start) & (first < end)]
    return rows
