"""The forward passes in which the step scores of many examples are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from prm.batches.prefix_trees import MOST_NODES, prefix_groups, tree_batch
from prm.batches.token_batches import token_batches
from prm.batches.workers import ordered_map
from prm.data.store.encoded import MOST_HELD, EncodedExamples
from prm.inputs.collate import Batch, Collator, EncodedExample
from prm.inputs.tokens import ImageTokens


@dataclass(frozen=True)
class Pass:
    """The examples of a forward pass.

    Attributes:
        groups: Their rows. With ``trees`` those of a group are a tree, else there is one group.
        trees: Whether solutions that begin alike are computed as trees.
    """

    groups: tuple[NDArray[np.int64], ...]
    trees: bool = False

    @property
    def rows(self) -> list[int]:
        """The rows of the examples in the order of the batch."""
        rows: list[int] = np.concatenate(self.groups).tolist()
        return rows

    def batch(
        self,
        encoded: Sequence[EncodedExample],
        collator: Callable[[Sequence[EncodedExample]], Batch],
    ) -> Batch:
        """Return the batch.

        Raises:
            DataError: An image cannot be decoded.
        """
        rows = _rows(encoded, self.rows)
        if not self.trees:
            return collator(rows)
        assert isinstance(collator, Collator)
        ends = np.cumsum([len(group) for group in self.groups]).tolist()
        numbers = [range(end - len(one), end) for one, end in zip(self.groups, ends, strict=True)]
        return tree_batch(collator, rows, numbers)


@dataclass(frozen=True)
class Passes:
    """What is to be computed of some examples.

    Attributes:
        steps: The number of steps of every example.
        passes: The passes, of which each example is in one.
    """

    steps: list[int]
    passes: list[Pass]


def passes_of(
    encoded: Sequence[EncodedExample],
    batch_size: int,
    tokens_per_batch: int | None = None,
    *,
    tile_tokens: int = 0,
    width: int | None = None,
    image_tokens: ImageTokens | None = None,
    workers: int = 0,
) -> Passes:
    """Return the passes over some examples, first those of examples that share nothing.

    Examples of similar length share a pass (``prm.batches.token_batches``). Of more examples than
    some thousands the tokens are not held: they are made once for the plan, and again for the
    batch. Solutions that are far apart in such a file then share nothing.

    Args:
        encoded: The examples.
        batch_size: The largest number of examples in a pass.
        tokens_per_batch: The largest number of tokens in a pass, None for any.
        tile_tokens: The tokens of a tile in the vision tower.
        width: The hidden size of a language model that takes trees; None means no trees.
        image_tokens: The tokens of a picture, None for a model without.
        workers: The number of processes that tokenise.
    """

    def stretch(start: int) -> tuple[NDArray[np.int64], list[tuple[NDArray[np.int64], int]]]:
        rows = encoded[start : start + MOST_HELD]
        shapes = np.array(
            [(len(row.input_ids), len(row.label_positions), sum(row.tile_counts)) for row in rows]
        )
        if width is None or batch_size == 1:
            return shapes, []
        limit = MOST_NODES if tokens_per_batch is None else tokens_per_batch
        room = (limit - shapes[:, 2] * tile_tokens).tolist()
        groups = prefix_groups(rows, image_tokens, width, most=batch_size, room=room)
        return shapes, [
            (start + np.array(numbers), nodes) for numbers, nodes in groups if len(numbers) > 1
        ]

    starts = range(0, len(encoded), MOST_HELD)
    parts = list(ordered_map(stretch, starts, workers if len(starts) > 1 else 0))
    shapes = np.concatenate([np.zeros((0, 3), dtype=np.int64), *(part[0] for part in parts)])
    images = shapes[:, 2] * tile_tokens
    trees = list(chain.from_iterable(part[1] for part in parts))
    members = [rows for rows, _ in trees]
    alone = np.ones(len(encoded), dtype=bool)
    if members:
        alone[np.concatenate(members)] = False
    rest = np.flatnonzero(alone)
    plain = token_batches(shapes[rest, 0], batch_size, tokens_per_batch, images[rest])
    shared = token_batches(
        np.array([nodes for _, nodes in trees], dtype=np.int64),
        batch_size,
        tokens_per_batch,
        images[[rows[0] for rows in members]],
        examples=np.array([len(rows) for rows in members], dtype=np.int64),
        most_pairs=MOST_NODES**2,
    )
    return Passes(
        shapes[:, 1].tolist(),
        [
            *(Pass((rest[rows],)) for rows in plain),
            *(Pass(tuple(members[tree] for tree in chosen), trees=True) for chosen in shared),
        ],
    )


def _rows(encoded: Sequence[EncodedExample], rows: Sequence[int]) -> Sequence[EncodedExample]:
    if isinstance(encoded, EncodedExamples):
        return encoded.at(rows)
    return [encoded[row] for row in rows]
