"""A lower pass of several examples under taps: see ``bilevel.lower.ghost``."""

from __future__ import annotations

from dataclasses import replace

import optree
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from bilevel import tree
from bilevel.autodiff import random_state
from bilevel.autodiff.gradient import gradients
from bilevel.autodiff.random_state import RandomState
from bilevel.lower.ghost.context import Context
from bilevel.lower.ghost.operations import OPERATIONS
from bilevel.lower.ghost.tracker import Refusal, Tracker
from bilevel.lower.micro_batch import Backward, PassContext, detached_backward, weighted_batch
from bilevel.problem import Batch, Params, weighted_mean
from bilevel.routes.dot import single_example
from bilevel.tree import Tree

ENTRIES_LIMIT = 1 << 26  # of the per-example gradients of a layer that are kept


def tapped_backward(
    context: PassContext,
    batch: Batch,
    random: RandomState,
    *,
    refusing: str | None = None,
    entries_limit: int = ENTRIES_LIMIT,
) -> Backward:
    """Weight the gradient per example, and get the products, in one backward pass.

    Args:
        context: What all micro-batches have in common.
        batch: The micro-batch; of one example it is as in ``Dot``.
        random: The random state from which it is run.
        refusing: Name of the route, for the error where there is no rule for something the model
            does; None: a plain backward pass is made instead, and a note says why.
        entries_limit: See ``PerExample``.

    Raises:
        Refusal: There is no rule for something the model does.
    """
    problem = context.reweighting
    taps = Context(entries_limit)
    tracker = Tracker(OPERATIONS, context.lower_params, batch, taps)
    with tracker:
        losses, features = problem.losses(tracker.visible, batch)
    weights = problem.weights_of(context.upper_params, batch, features, losses)
    owners = {} if problem.rows is None else problem.rows(batch)
    size = len(losses)
    micro = weighted_batch(batch, random, losses, weights)
    note = None if size == 1 else tracker.refusal(size, owners)
    if note is not None and refusing is not None:
        raise Refusal(f"route {refusing}(): {note}")
    if size == 1 or note is not None:
        loss = losses.mean() if size == 1 else weighted_mean(weights.detach(), losses)
        escaped, grads = gradients([loss], (tracker.visible, tracker.collectors))
        grads = tree.add(escaped, grads)
        if size == 1:
            return Backward(grads, single_example(context, micro, grads))
        return Backward(grads, replace(micro, note=note))
    known = None if context.direction is None else _by_leaf(context.lower_params, context.direction)
    keep = context.differentiate and known is None
    taps.weight(weights.detach(), owners, known, keep)
    try:
        escaped, grads = gradients([losses.mean()], (tracker.visible, tracker.collectors))
        if tree.leaves(escaped):
            note = (
                f"parameters {list(tree.flatten(escaped))} got a gradient past every torch "
                "operation (a custom autograd.Function or a compiled module?)"
            )
    except CheckpointError:
        note = "activation checkpointing runs parts of the model again, without their taps"
    if note is not None and refusing is not None:
        raise Refusal(f"route {refusing}(): {note}; choose the route Jvp()")
    if note is not None:
        with random_state.rewound_to(random, context.lower_params):
            plain = detached_backward(context, batch, random)
        return plain._replace(micro=replace(plain.micro, note=note))

    def dots(direction: Tree) -> Float[Tensor, " batch"]:
        if keep:
            return taps.later_dots(_by_leaf(context.lower_params, direction))
        assert taps.dots is not None
        return taps.dots

    return Backward(grads, replace(micro, dots=dots))


def _by_leaf(params: Params, direction: Tree) -> list[Tensor | None]:
    """Return the direction's leaves in the order of the parameters that there are."""
    leaves: list[Tensor | None] = optree.tree_structure(params).flatten_up_to(direction)
    return leaves
