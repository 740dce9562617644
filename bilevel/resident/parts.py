"""Parts of the leaves of a tree, small enough that what is computed from one stays in a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel import tree
from bilevel.optimizers.point import Leaves

# Entries of a part. On a CPU its temporaries, about eight, stay in the cache of a core; on a
# device a part is as large as its temporaries may be, since each operation is a launch.
CPU_ENTRIES, DEVICE_ENTRIES = 1 << 18, 1 << 26
# Entries that are looked at together for zeros, and the share of blocks with others above which
# it is not worth while to leave the zeros out.
BLOCK, _MOST = 1 << 10, 0.25
_FIRST = 16  # A gradient that is dense shows it in its first entries.


class Cut(NamedTuple):
    """A stretch of a leaf's entries, or all of it.

    Attributes:
        leaf: The index of the leaf.
        start: The first entry; None: the whole leaf, in its shape.
        stop: The entry after the last.
    """

    leaf: int
    start: int | None = None
    stop: int | None = None

    def of(self, column: Sequence[Tensor | None]) -> Tensor | None:
        """Return this stretch of a column's leaf, in the leaf's memory; None where it has none."""
        whole = column[self.leaf]
        if whole is None or self.start is None:
            return whole
        return whole.view(-1)[self.start : self.stop]


def parts(columns: Sequence[Leaves], entries: int | None = None) -> Iterator[list[Cut]]:
    """Yield the leaves that every column has, in parts of at most so many entries.

    A larger leaf is cut, or, if it is not contiguous in one of the columns, a part of its own;
    smaller ones are put together. All leaves of a part are on one device.

    Args:
        columns: Leaves of the same shapes. A leaf that is None in one of them is left out.
        entries: The most entries of a part; None: what suits the device.
    """
    gathered: dict[torch.device, tuple[list[Cut], int]] = {}
    for index, row in enumerate(zip(*columns, strict=True)):
        present = [leaf for leaf in row if leaf is not None]
        if len(present) < len(row) or not present[0].numel():
            continue
        device, size = present[0].device, present[0].numel()
        most = entries or (CPU_ENTRIES if device.type == "cpu" else DEVICE_ENTRIES)
        if size > most:
            if all(leaf.is_contiguous() for leaf in present):
                for start in range(0, size, most):
                    yield [Cut(index, start, min(start + most, size))]
            else:
                yield [Cut(index)]
        else:
            cuts, taken = gathered.get(device, ([], 0))
            if taken + size > most:
                yield cuts
                cuts, taken = [], 0
            gathered[device] = ([*cuts, Cut(index)], taken + size)
    yield from (cuts for cuts, _ in gathered.values())


def reached(cut: Cut, gradient: Leaves) -> list[Cut]:
    """Return the stretches of a cut outside which a gradient is zero.

    The gradient of an embedding is zero but for the rows of a batch's tokens, and that of a head
    of which two logits are read but for two rows. What is linear in the gradient and elementwise
    is zero there too, and need not be computed. In whole blocks of 1,024 entries; it is the cut
    itself where most blocks are reached, and where looking would not pay: of a leaf that is not
    cut, and on a device.

    Args:
        cut: The cut.
        gradient: Leaves; that of the cut is not None.
    """
    here = cut.of(gradient)
    assert here is not None
    if cut.start is None or not tree.on_cpu(here) or here.numel() % BLOCK or here[:_FIRST].any():
        return [cut]
    blocks = here.view(-1, BLOCK)
    found = blocks.amax(1).ne(0) | blocks.amin(1).ne(0)  # A NaN is both, and is not 0.
    if found.sum() > _MOST * len(blocks):
        return [cut]
    starts = (cut.start + BLOCK * found.nonzero().squeeze(1)).tolist()
    return [Cut(cut.leaf, start, start + BLOCK) for start in starts]
