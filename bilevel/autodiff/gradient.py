"""Gradients of scalars with respect to trees, and the gradients of the upper loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from bilevel import tree
from bilevel.autodiff.recomputation import watched_backward
from bilevel.collective import ALONE, Collective
from bilevel.problem import Batch, Params, Problem, detached, upper_value
from bilevel.profiling import part
from bilevel.tree import T, Tree, TreeT


def as_leaves(params: T) -> T:
    """Return the same values as new autograd leaves that require grad."""
    return tree.map(lambda leaf: leaf.detach().requires_grad_(), params)


def gradients(
    outputs: Sequence[Tensor],
    params: TreeT,
    cotangents: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
) -> TreeT:
    """Return Σ_k ⟨cotangent_k, ∂output_k/∂params⟩, None at leaves that no output depends on.

    All are dense, those of ``torch.nn.Embedding(sparse=True)`` too.

    Args:
        outputs: Scalars, or tensors of the cotangents' shapes. Those without a graph are left out.
        params: A tree of leaves that require grad, or None.
        cotangents: One cotangent per output. None means ones.
        create_graph: Whether the result can be differentiated again.

    Raises:
        RecomputationError: A part of the model was recomputed with other parameters.
    """
    leaves, structure = optree.tree_flatten(params, none_is_leaf=True)
    found: TreeT = structure.unflatten(
        leaf_gradients(outputs, leaves, cotangents, create_graph=create_graph)
    )
    return found


def leaf_gradients(
    outputs: Sequence[Tensor],
    leaves: Sequence[Tensor | None],
    cotangents: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
) -> list[Tensor | None]:
    """Return ``gradients`` with respect to the leaves of a tree, which is not taken apart again."""
    wanted = [index for index, leaf in enumerate(leaves) if leaf is not None]
    used = [index for index, output in enumerate(outputs) if output.requires_grad]
    result: list[Tensor | None] = [None] * len(leaves)
    if wanted and used:
        grads = watched_backward(
            [outputs[index] for index in used],
            [leaf for leaf in leaves if leaf is not None],
            None if cotangents is None else [cotangents[index] for index in used],
            create_graph=create_graph,
        )
        for index, gradient in zip(wanted, grads, strict=True):
            result[index] = dense(gradient)
    return result


def dense(gradient: Tensor | None) -> Tensor | None:
    """Return a gradient as a tensor with strides, whatever its layout."""
    if gradient is None or gradient.layout is torch.strided:
        return gradient
    return gradient.to_dense()


class UpperGradient(NamedTuple):
    """The upper loss, its gradients v with respect to θ and φ (the direct one), aux and notes."""

    loss: Tensor
    lower: Tree
    direct: Tree
    aux: Any = None
    notes: tuple[str, ...] = ()


@part("upper gradient")
def upper_gradient(
    problem: Problem,
    lower_params: Params,
    upper_params: Params,
    batch: Batch,
    collective: Collective = ALONE,
) -> UpperGradient:
    """Return the upper loss with its gradients with respect to θ and φ.

    Args:
        problem: The losses.
        lower_params: θ.
        upper_params: φ.
        batch: The upper batch, or this rank's part of it.
        collective: The ranks whose parts make up the upper batch.

    Raises:
        ValueError: The loss is not a scalar, or no rank has a part of the batch.
    """
    found, aux, examples = None, None, collective.upper_examples(batch)
    if examples:
        with torch.enable_grad():
            lower, upper = as_leaves(lower_params), as_leaves(upper_params)
            loss, aux = upper_value(problem, lower, upper, batch)
            found = loss.detach(), *gradients([loss], (lower, upper))
            del loss
    example = next(iter(tree.leaves(lower_params)), torch.zeros(()))
    like = example.new_zeros((), dtype=tree.wide_dtype(example.dtype)), lower_params, upper_params
    (loss, v, direct), total = collective.mean("upper gradient", found, examples, like)
    if not total:
        raise ValueError("upper_batch: expected at least 1 example on any of the ranks, found 0")
    return UpperGradient(loss, v, direct, detached(aux), ignored_lower(lower_params, v))


def ignored_lower(lower_params: Params, v: Tree) -> tuple[str, ...]:
    """Return a note if the upper loss, with gradient v (no leaves: none), ignores θ."""
    return () if tree.leaves(v) or not tree.leaves(lower_params) else (IGNORES_LOWER,)


IGNORES_LOWER = (
    "the upper loss does not depend on the lower parameters, so the lower level has no part in the "
    "hypergradient: let it use those that it is given (bilevel.functional calls a module with them)"
)
