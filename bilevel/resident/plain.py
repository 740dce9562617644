"""A lower step in place, without a derivative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import optree
import torch
from torch import Tensor

from bilevel import tree
from bilevel.autodiff import random_state
from bilevel.autodiff.gradient import as_leaves
from bilevel.autodiff.random_state import RandomState
from bilevel.lower.lower_pass import LowerPass, remarked
from bilevel.lower.micro_batch import MicroBatch, PassContext, weighted_batch
from bilevel.lower.route import Route
from bilevel.lower.steps import Point, Window
from bilevel.optimizers.elementwise import ElementwiseOptimizer
from bilevel.optimizers.point import Leaves
from bilevel.problem import Batch, Params
from bilevel.resident.memory import owned
from bilevel.resident.pieces import Gathered, Gathering, in_pieces
from bilevel.resident.streamed import streamed_backward
from bilevel.resident.update import group_names, step_, step_in_pieces_
from bilevel.routes.dot import kept_backward, single_example, single_loss
from bilevel.shards.step_passes import step_pass
from bilevel.tree import Tree


class Taken(NamedTuple):
    """A lower step that was taken, or left out.

    Attributes:
        point: θ and the optimizer's state after it.
        passed: The figures of its lower pass.
        skipped: Whether it was left out, because the norm of its gradient is not finite.
    """

    point: Point
    passed: LowerPass
    skipped: bool


def optimizer_of(window: Window) -> ElementwiseOptimizer:
    """Return the optimizer of a window, which ``ResidentSolver`` has checked."""
    return cast("ElementwiseOptimizer", window.optimizer)


def plain_step(window: Window, route: Route, point: Point, batches: Sequence[Batch]) -> Taken:
    """Take a lower step in place; with a gradient that is not finite nothing changes.

    Beside θ and the moments it holds one gradient.
    """
    upper_params = tree.map(Tensor.detach, window.upper_params)
    passed = step_pass(window, route, point.lower_params, upper_params, batches)
    return take(window, point, passed)


def take(window: Window, point: Point, passed: LowerPass) -> Taken:
    """Take the step of a lower pass in place, unless the norm of its gradient is not finite."""
    summary = passed.summary()
    if not window.guard.lower(summary.grad_norm, summary.loss_and_weights):
        return Taken(point, summary, True)
    assert summary.norm is not None
    usual = window.guard.usual
    point = step_(optimizer_of(window), point, passed.grads, summary.norm, usual=usual)
    return Taken(point, summary, False)


class Single(NamedTuple):
    """The lower pass of a single example, whose gradient is not yet multiplied by its weight.

    Attributes:
        grads: ∇ℓ like θ, in memory of its own.
        micro: What it left behind; its weight has a graph to φ if this requires grad.
        weight: The weight.
        passed: The figures of the pass.
        gathered: On a device, the pieces that ``grads`` are views of.
    """

    grads: Tree
    micro: MicroBatch
    weight: float
    passed: LowerPass
    gathered: Gathered | None = None


def single_pass(window: Window, upper_params: Params, point: Point, batch: Batch) -> Single:
    """Differentiate the unweighted loss of the only example of a step.

    The norm of the step is |w| ‖∇ℓ‖, and 0 for a weight of 0.

    Raises:
        ValueError: There are several examples.
    """
    context = PassContext(window.problem, point.lower_params, upper_params, False, None)
    random = random_state.capture(point.lower_params)
    gathered = None
    with torch.enable_grad():
        if in_pieces(point.lower_params):
            grads, micro, gathered = _gathered_backward(window, context, batch, random)
        else:
            grads, micro, _ = kept_backward(context, batch, random)
            grads = owned(grads)
    assert micro.weights is not None
    weight = float(micro.weights.detach()[0])
    norm = tree.norm([piece.flat for piece in gathered.pieces] if gathered else grads)
    norm = torch.zeros_like(norm) if weight == 0.0 else norm * abs(weight)
    passed = remarked(context, LowerPass(grads, [micro], norm)).summary()
    return Single(grads, micro, weight, passed, gathered)


def _gathered_backward(
    window: Window, context: PassContext, batch: Batch, random: RandomState
) -> tuple[Tree, MicroBatch, Gathered]:
    """Differentiate the unweighted loss into pieces; the gradient consists of views of them."""
    params = as_leaves(context.lower_params)
    gathered = Gathered(group_names(optimizer_of(window), params), [])
    losses, weights = single_loss(context, params, batch)
    gathering = Gathering(gathered.keys, gathered.pieces.append)
    leaves: Leaves = optree.tree_leaves(params, none_is_leaf=True)
    streamed_backward(losses.mean(), leaves, [], gathering.add)
    gathering.finish()
    micro = weighted_batch(batch, random, losses, weights)
    return gathered.like(params), single_example(context, micro, None), gathered


def single_step(window: Window, point: Point, single: Single, *, slopes: bool = False) -> Taken:
    """Take the step of a single example in place; ``slopes``: see ``update.step_``."""
    assert single.passed.norm is not None
    norm = single.passed.norm.cpu()  # The host waits for it once; what follows from it costs none.
    if not torch.isfinite(norm):
        return Taken(point, single.passed, True)
    optimizer, weight = optimizer_of(window), single.weight
    if single.gathered is not None:
        taken = step_in_pieces_(optimizer, point, single.gathered, norm, weight, slopes=slopes)
        if taken is not None:
            return Taken(taken, single.passed, False)
    norm = single.passed.norm
    point = step_(optimizer, point, single.grads, norm, weight=weight, slopes=slopes)
    return Taken(point, single.passed, False)
