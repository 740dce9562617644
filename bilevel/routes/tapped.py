"""A lower pass of several examples under taps: see ``bilevel.lower.ghost``."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import NamedTuple

import optree
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from bilevel import tree
from bilevel.autodiff import random_state
from bilevel.autodiff.gradient import as_leaves, gradients
from bilevel.autodiff.random_state import RandomState
from bilevel.lower.ghost import verification
from bilevel.lower.ghost.context import Context
from bilevel.lower.ghost.operations import OPERATIONS
from bilevel.lower.ghost.tracker import Refusal, Tracker
from bilevel.lower.guard import LOOKS
from bilevel.lower.micro_batch import (
    Backward,
    Fallback,
    PassContext,
    detached_backward,
    weighted_batch,
)
from bilevel.lower.second_order import put, zeros_for_none
from bilevel.problem import Batch, Params, weighted_mean
from bilevel.routes.dot import kept_backward, single_example
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
    run = _forward(context, batch, entries_limit)
    size, reason = len(run.losses), None
    if size > 1:
        reason = run.tracker.refusal(run.losses, run.owners, context.guard)
    if size > 1 and reason is None:
        key = verification.known(problem.verdicts, size, run.tracker.shapes)
        if key not in problem.verdicts:
            del run  # Its memory is free for the measurement.
            problem.verdicts.update(_measured(context, batch, random, key))
            with random_state.rewound_to(random, context.lower_params):
                run = _forward(context, batch, entries_limit)
        reason = problem.verdicts.get(key)
    if reason is not None and refusing is not None:
        raise _refusal(refusing, reason)
    if size <= 1 or reason is not None:
        return _noted(_plain(context, run, batch, random), reason)
    known = None
    if context.direction is not None:
        known = _by_leaf(context.lower_params, context.direction)
    keep = context.differentiate and known is None
    grads, reason = _weighted(run, run.weights.detach(), known, keep)
    if reason is None:
        micro = weighted_batch(batch, random, run.losses, run.weights)
        return Backward(grads, replace(micro, dots=_products(context, run.taps, keep)))
    if refusing is not None:
        raise _refusal(refusing, reason)
    return _noted(_again(context, batch, random), reason)


def _refusal(route: str, reason: str) -> Refusal:
    return Refusal(f"route {route}(): {reason}; or choose Auto(), which takes another route here")


def _noted(passed: Backward, reason: str | None) -> Backward:
    if reason is None:
        return passed
    fallback = Fallback({"PerExample()": reason}, "Jvp()")
    return passed._replace(micro=replace(passed.micro, fallback=fallback))


class _Run(NamedTuple):
    """A forward pass under taps."""

    tracker: Tracker
    taps: Context
    losses: Float[Tensor, " batch"]
    weights: Float[Tensor, " batch"]
    owners: Mapping[int, Tensor]


def _forward(context: PassContext, batch: Batch, entries_limit: int = ENTRIES_LIMIT) -> _Run:
    problem, taps = context.reweighting, Context(entries_limit, context.guard)
    tracker = Tracker(OPERATIONS, context.lower_params, batch, taps)
    with tracker:
        losses, features = problem.losses(tracker.visible, batch)
    weights = problem.weights_of(context.upper_params, batch, features, losses)
    owners = {} if problem.rows is None else problem.rows(batch)
    return _Run(tracker, taps, losses, weights, owners)


def _weighted(
    run: _Run, weights: Tensor, direction: list[Tensor | None] | None, keep: bool
) -> tuple[Tree, str | None]:
    """Return the gradient weighted per example, or why there is none."""
    run.taps.weight(weights, run.owners, direction, keep, run.losses)
    leaves = (run.tracker.visible, run.tracker.collectors)
    try:
        with run.tracker:  # Also for a part that is recomputed with the parameters of this call.
            escaped, grads = gradients([run.losses.mean()], leaves)
    except CheckpointError:
        return None, (
            "activation checkpointing runs parts of the model again with other parameters than the "
            "call's; call the module by bilevel.functional(module)"
        )
    if tree.leaves(escaped):
        return None, (
            f"parameters {list(tree.flatten(escaped))} got a gradient past every torch operation "
            "(a custom autograd.Function or a compiled module?)"
        )
    return _with_late(run, grads), None


@torch.no_grad()
def _with_late(run: _Run, grads: Tree) -> Tree:
    """Return the gradients with those that waited for the end of the pass."""
    structure = optree.tree_structure(run.tracker.collectors)
    leaves: list[Tensor | None] = structure.flatten_up_to(grads)
    for index, late in run.taps.late_gradients():
        there = leaves[index]
        leaves[index] = late if there is None else there + late
    joined: Tree = structure.unflatten(leaves)
    return joined


def _plain(context: PassContext, run: _Run, batch: Batch, random: RandomState) -> Backward:
    """Return the pass without weights per example, by the graph that there is."""
    losses, weights = run.losses, run.weights
    single = len(losses) == 1
    if run.tracker.differentiated:
        return _again(context, batch, random, single)
    loss = losses.mean() if single else weighted_mean(weights.detach(), losses)
    try:
        grads = tree.add(*gradients([loss], (run.tracker.visible, run.tracker.collectors)))
    except CheckpointError:
        del run, loss
        return _again(context, batch, random, single)
    micro = weighted_batch(batch, random, losses, weights)
    return Backward(grads, single_example(context, micro, grads) if single else micro)


def _again(
    context: PassContext, batch: Batch, random: RandomState, single: bool = False
) -> Backward:
    """Return the pass by a graph of its own, without taps."""
    with random_state.rewound_to(random, context.lower_params):
        return (kept_backward if single else detached_backward)(context, batch, random)


def _measured(
    context: PassContext, batch: Batch, random: RandomState, key: Hashable
) -> verification.Verdicts:
    """Return the verdict on the rules for this batch under the key; none without finite numbers."""
    here = context.lower_params
    steps = verification.displacement(here)
    length = tree.norm(steps)
    direction: list[Tensor | None] = [step / length for step in steps]
    for params in (tree.map(torch.add, here, put(here, steps)), here):
        nearby = replace(
            context, lower_params=params, differentiate=False, direction=None, guard=LOOKS
        )
        with random_state.rewound_to(random, params):
            run = _forward(nearby, batch)
        weights = verification.uneven(run.losses)
        grads, reason = _weighted(run, weights, direction, False)
        if reason is not None:
            return {key: reason}
        dtypes = {run.losses.dtype, *(output.dtype for output in run.tracker.outputs)}
        found = [*_filled(grads, params), (weights * run.taps.dots).sum()]
        del run, grads
        with random_state.rewound_to(random, params):
            leaves = as_leaves(params)
            losses, _ = context.reweighting.losses(leaves, batch)
        plain = _filled(gradients([weighted_mean(weights, losses)], leaves), params)
        dtypes |= {leaf.dtype for leaf in plain}
        eps = verification.rounding(dtypes, losses.device)
        off = verification.distance(found, [*plain, tree.vdot(plain, direction)], eps)
        if not math.isnan(off):
            return {key: _DIFFERS.format(off) if off else None}
    return {}


_DIFFERS = (
    "weighted example by example the gradient is {:.0%} off, for examples influence each other "
    "(batch statistics, contrastive terms), or a dimension as long as the batch is not theirs"
)


def _filled(grads: Tree, params: Params) -> list[Tensor]:
    """Return the gradients leaf by leaf, with zeros where there is none."""
    return list(zeros_for_none(_by_leaf(params, grads), tree.leaves(params)))


def _products(
    context: PassContext, taps: Context, keep: bool
) -> Callable[[Tree], Float[Tensor, " batch"]]:
    if keep:
        return lambda direction: taps.later_dots(_by_leaf(context.lower_params, direction))
    known = taps.dots  # The taps, which hold the direction, are not held.
    return lambda _: known


def _by_leaf(params: Params, direction: Tree) -> list[Tensor | None]:
    """Return the direction's leaves in the order of the parameters that there are."""
    leaves: list[Tensor | None] = optree.tree_structure(params).flatten_up_to(direction)
    return leaves
