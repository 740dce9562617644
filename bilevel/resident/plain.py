"""A lower step in place, without a derivative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from bilevel import tree
from bilevel.autodiff import random_state
from bilevel.lower.lower_pass import LowerPass, remarked
from bilevel.lower.micro_batch import MicroBatch, PassContext
from bilevel.lower.route import Route
from bilevel.lower.steps import Point, Window
from bilevel.optimizers.elementwise import ElementwiseOptimizer
from bilevel.problem import Batch, Params
from bilevel.resident.memory import owned
from bilevel.resident.passes import step_pass
from bilevel.resident.update import step_
from bilevel.routes.dot import kept_backward
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
    if not torch.isfinite(summary.grad_norm):
        return Taken(point, summary, True)
    assert summary.norm is not None
    point = step_(optimizer_of(window), point, passed.grads, summary.norm)
    return Taken(point, summary, False)


class Single(NamedTuple):
    """The lower pass of a single example, whose gradient is not yet multiplied by its weight.

    Attributes:
        grads: ∇ℓ like θ, in memory of its own.
        micro: What it left behind; its weight has a graph to φ if this requires grad.
        weight: The weight.
        passed: The figures of the pass.
    """

    grads: Tree
    micro: MicroBatch
    weight: float
    passed: LowerPass


def single_pass(window: Window, upper_params: Params, point: Point, batch: Batch) -> Single:
    """Differentiate the unweighted loss of the only example of a step.

    The norm of the step is |w| ‖∇ℓ‖, and 0 for a weight of 0.

    Raises:
        ValueError: There are several examples.
    """
    context = PassContext(window.problem, point.lower_params, upper_params, False, None)
    random = random_state.capture(point.lower_params)
    with torch.enable_grad():
        backward = kept_backward(context, batch, random)
    micro = backward.micro
    assert micro.weights is not None
    weight = float(micro.weights.detach()[0])
    norm = tree.norm(backward.grads)
    norm = torch.zeros_like(norm) if weight == 0.0 else norm * abs(weight)
    passed = remarked(context, LowerPass(backward.grads, [micro], norm)).summary()
    return Single(owned(backward.grads), micro, weight, passed)


def single_step(window: Window, point: Point, single: Single, *, slopes: bool = False) -> Taken:
    """Take the step of a single example in place; ``slopes``: see ``update.step_``."""
    norm: Any = single.passed.norm
    if not torch.isfinite(norm):
        return Taken(point, single.passed, True)
    point = step_(
        optimizer_of(window), point, single.grads, norm, weight=single.weight, slopes=slopes
    )
    return Taken(point, single.passed, False)
