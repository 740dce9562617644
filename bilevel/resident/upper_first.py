"""Order upper-first in place: μ in the memory of v, then any lower pass, then the step.

v = ∇L_upper(θ) is known before the lower pass and becomes μ where it lies. All of the hypergradient
is known before θ moves, so that any route and any number of micro-batches will do, and a step that
is left out leaves nothing to restore. Beside θ, the gradient and the moments there is μ, and the
average of v if there is one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import optree
import torch
from torch import Tensor

from bilevel import tree
from bilevel.autodiff import random_state
from bilevel.autodiff.gradient import UpperGradient, as_leaves
from bilevel.autodiff.random_state import RandomState
from bilevel.hypergradients.base import HypergradientResult
from bilevel.hypergradients.one_step import (
    DirectionAverage,
    DirectionMemory,
    HeldDirection,
    OneStep,
    keeps_graph,
    step_notes,
)
from bilevel.hypergradients.update_derivative import Identity
from bilevel.lower.lower_pass import LowerPass
from bilevel.lower.mixed_product import mixed_product
from bilevel.lower.steps import LowerSteps, Point, Window
from bilevel.optimizers.point import Leaves
from bilevel.problem import Batch, Params
from bilevel.resident.average import average_, without_
from bilevel.resident.memory import owned
from bilevel.resident.pieces import Gathered, Gathering, in_pieces
from bilevel.resident.plain import (
    Single,
    Taken,
    optimizer_of,
    plain_step,
    single_pass,
    single_step,
    take,
)
from bilevel.resident.streamed import streamed_upper_gradient
from bilevel.resident.update import group_names, predict_, predict_in_pieces
from bilevel.routes import Dot
from bilevel.shards.step_passes import norm_over_ranks, step_pass, upper_pass
from bilevel.tree import Tree


def take_window(
    window: Window,
    method: OneStep,
    upper_batch: Batch | None,
    memory: DirectionMemory = None,
) -> tuple[LowerSteps, HypergradientResult | None]:
    """Take the lower steps of a window in place and differentiate through the last one.

    Args:
        window: The window.
        method: The hypergradient, in order upper-first.
        upper_batch: None: lower steps alone, which are the same bit for bit.
        memory: The average of v, or a v for several steps, changed in place; or None.
    """
    point, passes, skipped = window.start, [], list[int]()
    result = None
    for index, batches in enumerate(window.batches):
        if upper_batch is not None and index == len(window.batches) - 1:
            taken, result = _differentiated(window, method, point, upper_batch, memory)
        elif _gathers(window, method, point, batches):
            upper_params = tree.map(Tensor.detach, window.upper_params)
            taken = single_step(window, point, single_pass(window, upper_params, point, batches[0]))
        else:
            taken = plain_step(window, method.route, point, batches)
        point = taken.point
        passes.append(taken.passed)
        if taken.skipped:
            skipped.append(index)
    return LowerSteps(point, tuple(passes), tuple(skipped)), None if skipped else result


def _differentiated(
    window: Window,
    method: OneStep,
    point: Point,
    upper_batch: Batch,
    memory: DirectionMemory,
) -> tuple[Taken, HypergradientResult]:
    """Take the last step of a window, and differentiate through it."""
    random = random_state.capture(point.lower_params)
    upper_params = as_leaves(window.upper_params)
    upper: UpperGradient | None = None
    v: Gathered | None = None
    if isinstance(memory, HeldDirection) and not method.reads_upper_batch(memory):
        direction: Tree
        after: DirectionMemory
        direction, after = method.held(memory, point.lower_params)
    else:
        upper, v = _upper_gradient(window, point, upper_batch, random)
        method.check_direct(upper.direct)
        direction, after = owned(upper.lower) if v is None else upper.lower, memory
        upper = upper._replace(lower=None)
        if memory is not None and _finite(norm_over_ranks(window, direction), upper.loss):
            after = _renewed(direction, memory, method.direction_decay)
    if isinstance(method.update_derivative, Identity):
        with torch.no_grad():
            tree.map(Tensor.neg_, direction if v is None else [piece.flat for piece in v.pieces])
    elif v is None:
        predict_(optimizer_of(window), point, direction)
    else:
        del direction
        v = predict_in_pieces(optimizer_of(window), point, v)
        direction = v.like(point.lower_params)
    single = None
    if v is not None and _gathers(window, method, point, window.batches[-1]):
        single = single_pass(window, upper_params, point, window.batches[-1][0])
        passed = _multiplied(single, v, direction)
    else:
        passed = step_pass(
            window,
            method.route,
            point.lower_params,
            upper_params,
            window.batches[-1],
            differentiate=True,
            direction=direction,
            keep_graph=keeps_graph(method, window, point.lower_params),
        )
    product = mixed_product(
        window.problem, method.route, passed, point.lower_params, upper_params, direction
    )
    del direction, v
    notes = (*passed.notes, *step_notes(method.order, window, point.optimizer_state))
    if upper is None:
        return take(window, point, passed), HypergradientResult(None, product, after, notes=notes)
    with torch.no_grad():
        hypergradient = tree.add(product, upper.direct)
    result = HypergradientResult(
        upper.loss, hypergradient, after, notes=(*notes, *upper.notes), upper_aux=upper.aux
    )
    window.guard.upper(tree.norm(hypergradient), upper.loss)
    moved = memory is not None and after is not memory and method.direction_decay
    if moved and not _finite(hypergradient, upper.loss, passed.grad_norm):
        assert memory is not None
        # φ will not move, and neither does the average: θ is where it was, and so is v. (A v alone
        # is of no more use: the next upper step computes it again.)
        again, _ = _upper_gradient(window, point, upper_batch, random)
        without_(again.lower, _average(memory), method.direction_decay)
    if single is not None:
        return single_step(window, point, single), result
    return take(window, point, passed), result


def _average(memory: DirectionAverage | HeldDirection) -> DirectionAverage:
    return memory.held if isinstance(memory, HeldDirection) else memory


def _renewed(
    direction: Tree, memory: DirectionAverage | HeldDirection, decay: float
) -> DirectionMemory:
    """Put a new v into the memory, and what takes its place into v, both in place."""
    average = average_(direction, _average(memory), decay)
    if isinstance(memory, HeldDirection):
        return HeldDirection(average, torch.ones_like(memory.uses))
    return average


def _upper_gradient(
    window: Window, point: Point, batch: Batch, random: RandomState
) -> tuple[UpperGradient, Gathered | None]:
    """Return the upper gradient, and on a device the pieces that v consists of."""
    problem, params = window.problem, point.lower_params
    with random_state.rewound_to(random, params):
        if not _in_pieces(window, params):
            return upper_pass(window, params, batch), None
        v = Gathered(group_names(optimizer_of(window), params), [])
        gathering = Gathering(v.keys, v.pieces.append)
        upper = streamed_upper_gradient(problem, point, window.upper_params, batch, gathering.add)
        gathering.finish()
        return upper._replace(lower=v.like(params)), v


def _gathers(window: Window, method: OneStep, point: Point, batches: Sequence[Batch]) -> bool:
    """Return whether the gradient of a step is that of a single example, in pieces.

    Its weight and norm are numbers of the host, so not where the host does not look.
    """
    looks, pieces = window.guard.usual is None, _in_pieces(window, point.lower_params)
    return looks and method.route == Dot() and len(batches) == 1 and pieces


def _in_pieces(window: Window, params: Params) -> bool:
    """Return whether gradients are gathered; over ranks they are summed leaf by leaf."""
    return window.collective.ranks == 1 and in_pieces(params)


@torch.no_grad()
def _multiplied(single: Single, direction: Gathered, leaves: Tree) -> LowerPass:
    """Return the figures of a pass of a single example, and with them ⟨μ, ∇ℓ⟩."""
    assert single.gathered is not None
    views: Leaves = optree.tree_leaves(leaves, none_is_leaf=True)
    like: Leaves = optree.tree_leaves(single.grads, none_is_leaf=True)
    terms = []
    for piece in single.gathered.pieces:
        wide = piece.flat.to(tree.wide_dtype(piece.flat.dtype))
        terms.append((wide * direction.in_order_of(piece, views, like)).sum())
    dot = tree.total(terms, like=single.grads)
    micro = replace(single.micro, dots=lambda _: dot[None])
    return replace(single.passed, micro_batches=[micro])


def _finite(*values: Tree) -> bool:
    return all(math.isfinite(float(tree.norm(value))) for value in values)
