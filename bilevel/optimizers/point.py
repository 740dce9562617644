"""The point at which an update is evaluated: the leaves and scalars of one step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import optree
import torch
from torch import Tensor

from bilevel import tree
from bilevel.optimizers.base import CLIP_EPS, OptimizerState
from bilevel.tree import Tree

Leaves: TypeAlias = list[Tensor | None]


class LeafKey(NamedTuple):
    """The properties that leaves must share to be updated together."""

    dtype: torch.dtype
    grad_dtype: torch.dtype
    device: torch.device
    decay: float | None  # None: the leaf does not decay
    group: str


class UpdatePoint(NamedTuple):
    """The inputs of an update: leaves in the parameters' order, and the step's scalars.

    Attributes:
        structure: The structure of the parameters.
        params: The parameters before the step.
        grads: Their gradients.
        moments: The first and second moments before the step.
        steps: The number of the step, from 1.
        keys: One for each leaf that the step changes.
        lrs: The learning rate of each group.
        norm: The norm of all gradients, if there is a clip.
        scale: The clip scale.
    """

    structure: Any
    params: Leaves
    grads: Leaves
    moments: list[Leaves]
    steps: int
    keys: list[LeafKey | None]
    lrs: Mapping[str, float | Tensor]
    norm: Tensor | None = None
    scale: Tensor | None = None


def update_point(grads: Tree, state: OptimizerState, params: Tree) -> UpdatePoint:
    """Return the point of an update that is not clipped, still without keys and rates.

    Args:
        grads: Gradients like ``params``. None leaves are left out of the update.
        state: The state before the step.
        params: The parameters before the step.

    Raises:
        ValueError: Structures differ, or the shape of a gradient is not its parameter's.
    """
    leaves, structure = optree.tree_flatten(params, none_is_leaf=True)
    gradients = structure.flatten_up_to(grads)
    check_shapes(params, leaves, gradients, "gradient")
    return UpdatePoint(
        structure=structure,
        params=leaves,
        grads=gradients,
        moments=[column(structure, moment, len(leaves)) for moment in state[1:]],
        steps=int(state.steps) + 1,
        keys=[],
        lrs={},
    )


def column(structure: Any, values: Tree, size: int) -> Leaves:
    """Return one value per leaf, or Nones if there is no such tree."""
    return [None] * size if values is None else structure.flatten_up_to(values)


def zero_filled(structure: Any, bars: Tree, values: Leaves) -> Leaves:
    """Return one cotangent per leaf: zeros in place of None, and None where there is no value.

    The zeros take no memory: there is one, which stands for all entries.
    """
    return [
        value.new_zeros(()).expand_as(value) if bar is None and value is not None else bar
        for bar, value in zip(column(structure, bars, len(values)), values, strict=True)
    ]


def or_else(columns: list[Leaves], defaults: list[Leaves]) -> list[Leaves]:
    """Return ``columns`` with each None replaced by its default (leaves without a gradient)."""
    return [
        [old if new is None else new for old, new in zip(olds, news, strict=True)]
        for olds, news in zip(defaults, columns, strict=True)
    ]


def add_scale_path(at: UpdatePoint, grads_bar: Leaves, max_norm: float) -> Leaves:
    """Add the cotangent of the gradients through the clip scale c(‖g‖), if it is below 1.

    With h = c ḡ₁, the cotangent for constant c, the term is ``− g ⟨g, h⟩ / (‖g‖ (‖g‖ + 1e-6))``.
    """
    assert at.norm is not None
    assert at.scale is not None
    tiny = torch.finfo(at.norm.dtype).tiny
    pull = tree.vdot(at.grads, grads_bar) / (at.norm.clamp(min=tiny) * (at.norm + CLIP_EPS))
    pull = torch.where(max_norm / (at.norm + CLIP_EPS) < 1.0, pull, 0.0)
    return [
        None if bar is None or g is None else bar - g * pull.to(g.dtype)
        for bar, g in zip(grads_bar, at.grads, strict=True)
    ]


def check_shapes(params: Tree, leaves: Leaves, values: Leaves, what: str) -> None:
    """Raise ValueError, naming the leaf, if a value's shape is not that of its parameter.

    Args:
        params: The parameters.
        leaves: The leaves of ``params``.
        values: One value per leaf.
        what: The name of such a value in the message.
    """
    for index, (leaf, value) in enumerate(zip(leaves, values, strict=True)):
        if leaf is not None and value is not None and leaf.shape != value.shape:
            name = tree.names(params, none_is_leaf=True)[index]
            raise ValueError(
                f"{what} of {name!r}: expected shape {tuple(leaf.shape)}, "
                f"found {tuple(value.shape)}"
            )
