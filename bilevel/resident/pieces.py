"""Gradients in few long pieces, for devices, where every operation is a launch however short it is.

A gradient comes leaf by leaf in the backward pass. Leaves that have come are put together, so that
what is computed from a gradient of hundreds of leaves takes a few operations, and are freed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel import tree
from bilevel.autodiff.gradient import dense
from bilevel.autodiff.recomputation import watched_backward
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
    """A gradient in pieces, and by what its leaves were put together: see ``Gathering``."""

    keys: Sequence[Hashable]
    pieces: list[Piece]

    def views(self, like: Leaves) -> Leaves:
        """Return each leaf in its shape, in the memory of the pieces; None: it has no gradient."""
        found: dict[int, Tensor] = {}
        for piece in self.pieces:
            found |= piece.views(like)
        return [found.get(index) for index in range(len(like))]


def in_pieces(params: Tree) -> bool:
    """Return whether gradients of these parameters are gathered: all are on one device, no CPU."""
    devices = {leaf.device for leaf in tree.leaves(params)}
    return len(devices) == 1 and next(iter(devices)).type not in ("cpu", "meta")


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


def streamed_backward(
    loss: Tensor,
    leaves: Leaves,
    others: Sequence[Tensor],
    receive: Callable[[int, Tensor], None],
) -> None:
    """Differentiate a loss, and hand over the gradient of each leaf as soon as it is whole.

    It is not held here any longer, so that there need never be all of them.

    Args:
        loss: A scalar.
        leaves: Autograd leaves that require grad, or None.
        others: Further ones, whose gradients are left in their ``grad``.
        receive: Called with the index of a leaf and its gradient, for those that the loss reaches.

    Raises:
        RecomputationError: A part of the model was recomputed with other parameters.
    """
    for index, leaf in enumerate(leaves):
        if leaf is not None:
            leaf.register_post_accumulate_grad_hook(_hook(index, receive))
    wanted = [*(leaf for leaf in leaves if leaf is not None), *others]
    if wanted and loss.requires_grad:
        watched_backward([loss], wanted, accumulate=True)


def _hook(index: int, receive: Callable[[int, Tensor], None]) -> Callable[[Tensor], None]:
    # Knows nothing of the leaf that it hangs on, whose memory a cycle would hold.
    def use(leaf: Tensor) -> None:
        gradient, leaf.grad = dense(leaf.grad), None
        assert gradient is not None
        receive(index, gradient)

    return use
