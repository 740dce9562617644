"""Replay memory: the steps of an optimizer, last one first, without having kept their points.

From a kept point and the gradients, every later (θ, s) follows by the optimizer's elementwise
update alone, in the same arithmetic and hence to the last bit, with no pass through the model. So a
step costs one gradient to remember, 1 × θ, where its point would cost 3 × θ for Adam.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bilevel import tree
from bilevel.lower.steps import Point, advance
from bilevel.optimizers.base import Optimizer
from bilevel.tree import Tree

Store = Literal["device", "host"]


@dataclass(frozen=True, eq=False)
class Kept:
    """A tree that is kept: where it was ("device"), or in CPU memory ("host"), pinned for a GPU.

    Attributes:
        stored: The tree as it is kept.
        devices: Where its tensors were, if any of them was moved.
    """

    stored: Any
    devices: Tree | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return _bytes(self.stored)

    def fetch(self) -> Any:
        """Return the tree where it was."""
        if self.devices is None:
            return self.stored
        back = lambda leaf, device: leaf.to(device, non_blocking=True)  # noqa: E731
        return tree.map(back, self.stored, self.devices)


def keep(values: Any, store: Store) -> Kept:
    """Keep a tree without graphs; with "host" on the CPU, where nothing is copied for it."""
    if store == "device" or all(leaf.is_cpu for leaf in tree.leaves(values)):
        return Kept(values)
    return Kept(tree.map(_on_host, values), tree.map(lambda leaf: leaf.device, values))


def _on_host(leaf: Tensor) -> Tensor:
    if leaf.is_cpu:
        return leaf
    # Both copies run on the device's stream, in order; the CPU never looks at the numbers.
    host = torch.empty_like(leaf, device="cpu", pin_memory=leaf.is_cuda)
    return host.copy_(leaf, non_blocking=leaf.is_cuda)


def way_points(point: Point, steps: int) -> list[int]:
    """Return the steps whose points ``backwards`` needs first, in order: to keep when they pass by.

    The first of ``steps``, whose point this is, and the middles of what remains. The first alone
    where points are hardly larger than gradients.
    """
    indices = [0]
    light = _light(_bytes(point), _bytes(point.lower_params))
    while steps - indices[-1] > 1 and not light:
        indices.append((indices[-1] + steps) // 2)
    return indices


def backwards(
    optimizer: Optimizer, points: list[tuple[int, Kept]], grads: list[Kept], store: Store
) -> Iterator[tuple[Tree, Point]]:
    """Yield (gradient, point before its step) from the last step to the first.

    Points are found by bisection: N steps take at most (N/2) log₂ N updates, N − 1 fewer if all
    ``way_points`` are given, and log₂ N points in memory besides the start. Where a point is hardly
    larger than a gradient (SGD without momentum), one is kept only when a used gradient has made
    room for it, for at most 3N updates more: then the gradients and the start are all there ever
    is, and memory grows by 1 × θ per step.

    Args:
        optimizer: What took the steps.
        points: Before the first step, and further ones, with their indices. Emptied.
        grads: One per step. Emptied as the sweep goes, so that memory falls with it.
        store: Where the points on the way are kept.
    """
    end = total = len(grads)
    light = bool(grads) and _light(points[0][1].nbytes, grads[0].nbytes)
    while points:
        at, kept = points.pop()
        point = kept.fetch()
        while end - at > 1:
            points.append((at, kept))
            crowded = light and len(points) >= total - end
            middle = end - 1 if crowded else (at + end) // 2
            for index in range(at, middle):
                point = advance(optimizer, point, grads[index].fetch())
            at = middle
            if not crowded:
                kept = keep(point, store)
        end = at
        last = [(grads.pop().fetch(), point)]
        del point, kept  # whoever takes the point decides when its memory is free
        yield last.pop()


def _light(point: int, gradient: int) -> bool:
    """Return whether a point, in bytes, is hardly larger than a gradient: there are no moments."""
    return point <= 1.5 * gradient


def _bytes(values: Tree) -> int:
    return sum(leaf.nbytes for leaf in tree.leaves(values))
