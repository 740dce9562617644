"""Gradients in few long pieces, for devices, where every operation is a launch however short it is.

A gradient comes leaf by leaf in the backward pass. Leaves that have come are put together, so that
what is computed from a gradient of hundreds of leaves takes a few operations, and are freed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import optree
import torch
from torch import Tensor

from bilevel import tree
from bilevel.optimizers.point import Leaves
from bilevel.tree import Tree

# Entries of a piece, in float32 1 GB. What is computed from one takes two temporaries of its size.
ENTRIES = 1 << 28


class Piece(NamedTuple):
    """Values of some leaves, end to end in memory of their own.

    Attributes:
        leaves: The indices of the leaves, in order.
        flat: Their entries, [entries].
    """

    leaves: tuple[int, ...]
    flat: Tensor

    def views(self, like: Leaves) -> dict[int, Tensor]:
        """Return each leaf by its index, in its shape and in this memory."""
        shapes = [leaf.shape for index in self.leaves if (leaf := like[index]) is not None]
        cuts = self.flat.split([shape.numel() for shape in shapes])
        return {
            index: cut.view(shape)
            for index, cut, shape in zip(self.leaves, cuts, shapes, strict=True)
        }


class Gathered(NamedTuple):
    """Leaves in pieces, and by what they were put together: see ``Gathering``."""

    keys: Sequence[Hashable]
    pieces: list[Piece]

    def views(self, like: Leaves) -> Leaves:
        """Return each leaf in its shape, in the memory of the pieces; None: it has no gradient."""
        found: dict[int, Tensor] = {}
        for piece in self.pieces:
            found |= piece.views(like)
        return [found.get(index) for index in range(len(like))]

    def like(self, params: Tree) -> Tree:
        """Return the leaves in the structure of the parameters."""
        leaves, structure = optree.tree_flatten(params, none_is_leaf=True)
        found: Tree = structure.unflatten(self.views(leaves))
        return found

    def in_order_of(self, piece: Piece, leaves: Leaves, like: Leaves) -> Tensor:
        """Return the entries of the leaves of another piece, in its order.

        Args:
            piece: A piece of other values.
            leaves: All leaves, views of the pieces here; None: zeros.
            like: Leaves of their shapes.
        """
        same = (one.flat for one in self.pieces if one.leaves == piece.leaves)
        for flat in same:
            return flat
        # Two losses reached other leaves, or the same in another order.
        found: list[Tensor] = []
        for index in piece.leaves:
            leaf, shaped = leaves[index], like[index]
            assert shaped is not None
            found.append((torch.zeros_like(shaped) if leaf is None else leaf).reshape(-1))
        return torch.cat(found)


def in_pieces(params: Tree) -> bool:
    """Return whether gradients are gathered: all parameters are whole and on one device, no CPU."""
    leaves = tree.leaves(params)
    devices = {leaf.device for leaf in leaves}
    if len(devices) != 1 or any(tree.is_sharded(leaf) for leaf in leaves):
        return False
    return next(iter(devices)).type not in ("cpu", "meta")


class Gathering:
    """Puts leaves together as they come.

    Args:
        keys: One per leaf: only leaves of one key, and of one precision, make up a piece.
        use: Called with each piece as soon as it is full.
        entries: The most entries of a piece of several leaves; None: ``ENTRIES``.
    """

    def __init__(
        self,
        keys: Sequence[Hashable],
        use: Callable[[Piece], None],
        entries: int | None = None,
    ) -> None:
        self._keys, self._use, self._most = keys, use, entries or ENTRIES
        self._waiting: dict[Hashable, tuple[list[int], list[Tensor]]] = {}

    def add(self, index: int, leaf: Tensor) -> None:
        """Take a leaf, which must not be needed elsewhere."""
        key = self._keys[index], leaf.dtype
        indices, tensors = self._waiting.setdefault(key, ([], []))
        if tensors and sum(one.numel() for one in tensors) + leaf.numel() > self._most:
            self._give(key)
            indices, tensors = self._waiting.setdefault(key, ([], []))
        indices.append(index)
        tensors.append(leaf.reshape(-1))

    def finish(self) -> None:
        """Hand over what is left."""
        for key in list(self._waiting):
            self._give(key)

    def _give(self, key: Hashable) -> None:
        indices, tensors = self._waiting.pop(key)
        # A copy also of a single leaf: autograd may give two leaves the same memory.
        flat = torch.cat(tensors)
        tensors.clear()
        self._use(Piece(tuple(indices), flat))
