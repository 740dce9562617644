"""A micro-batch of several examples under taps: see `bilevel.lower.ghost`."""

from __future__ import annotations

from dataclasses import replace

import optree
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from bilevel import tree
from bilevel.autodiff import random_state
from bilevel.autodiff.gradient import gradients
from bilevel.autodiff.random_state import RandomState
from bilevel.lower.ghost.context import Context
from bilevel.lower.ghost.operations import OPERATIONS
from bilevel.lower.ghost.tracker import Refusal, Tracker
from bilevel.lower.micro_batch import MicroBatch, Run, run_detached, single, weighted_batch
from bilevel.problem import Batch, Params, ReweightingProblem, weighted_mean
from bilevel.routes import Auto, PerExample
from bilevel.tree import Tree


def run_tapped(run: Run, batch: Batch, random: RandomState) -> tuple[Tree, MicroBatch]:
    """Several examples: gradient weighted per example and products from one backward pass."""
    problem, auto = run.problem, isinstance(run.route, Auto)
    assert isinstance(problem, ReweightingProblem)
    keeping = run.route if isinstance(run.route, PerExample) else PerExample()
    context = Context(keeping.entries_limit)
    tracker = Tracker(OPERATIONS, run.lower_params, batch, context)
    with tracker:
        losses, features = problem.losses(tracker.visible, batch)
    weights = problem.weights_of(run.upper_params, batch, features, losses)
    owners = {} if problem.rows is None else problem.rows(batch)
    size = len(losses)
    note = None if size == 1 else tracker.refusal(size, owners)
    if note is not None and not auto:
        raise Refusal(f"route {type(run.route).__name__}(): {note}")
    if size == 1 or note is not None:
        loss = losses.mean() if size == 1 else weighted_mean(weights.detach(), losses)
        escaped, grads = gradients([loss], (tracker.visible, tracker.collectors))
        grads = tree.add(escaped, grads)
        if size == 1:
            return grads, single(run, batch, random, losses, weights, grads)
        return grads, weighted_batch(batch, random, losses, weights, note=note)
    known = None if run.direction is None else _by_leaf(run.lower_params, run.direction)
    keep = run.differentiate and known is None
    context.weight(weights.detach(), owners, known, keep)
    try:
        escaped, grads = gradients([losses.mean()], (tracker.visible, tracker.collectors))
        if tree.leaves(escaped):
            note = (
                f"parameters {list(tree.flatten(escaped))} got a gradient past every torch "
                "operation (a custom autograd.Function or a compiled module?)"
            )
    except CheckpointError:
        note = "activation checkpointing runs parts of the model again, without their taps"
    if note is not None and not auto:
        raise Refusal(f"route {type(run.route).__name__}(): {note}; choose the route Jvp()")
    if note is not None:
        with random_state.replay(random, run.lower_params):
            grads, micro = run_detached(run, batch, random)
        return grads, replace(micro, note=note)

    def dots(direction: Tree) -> Tensor:
        if keep:
            return context.later_dots(_by_leaf(run.lower_params, direction))
        assert context.dots is not None
        return context.dots

    return grads, weighted_batch(batch, random, losses, weights, dots)


def _by_leaf(params: Params, direction: Tree) -> list[Tensor | None]:
    """Return the direction's leaves in the order of the parameters that there are."""
    found: list[Tensor | None] = optree.tree_structure(params).flatten_up_to(direction)
    return found
