"""Order upper-first in place: μ in the memory of v, then any lower pass, then the step.

v = ∇L_upper(θ) is known before the lower pass and becomes μ where it lies. All of the hypergradient
is known before θ moves, so that any route and any number of micro-batches will do, and a step that
is left out leaves nothing to restore. Beside θ, the gradient and the moments there is μ, and the
average of v if there is one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel import tree
from bilevel.autodiff import random_state
from bilevel.autodiff.gradient import UpperGradient, as_leaves, upper_gradient
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
from bilevel.lower.lower_pass import lower_pass
from bilevel.lower.mixed_product import mixed_product
from bilevel.lower.steps import LowerSteps, Point, Window
from bilevel.problem import Batch
from bilevel.resident.average import average_, without_
from bilevel.resident.memory import owned
from bilevel.resident.plain import Taken, optimizer_of, plain_step, take
from bilevel.resident.update import predict_
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
    if isinstance(memory, HeldDirection) and not method.reads_upper_batch(memory):
        direction: Tree
        after: DirectionMemory
        direction, after = method.held(memory, point.lower_params)
    else:
        upper = _upper_gradient(window, point, upper_batch, random)
        method.check_direct(upper.direct)
        direction, after = owned(upper.lower), memory
        upper = upper._replace(lower=None)
        if memory is not None and _finite(direction, upper.loss):
            after = _renewed(direction, memory, method.direction_decay)
    if isinstance(method.update_derivative, Identity):
        with torch.no_grad():
            tree.map(Tensor.neg_, direction)
    else:
        predict_(optimizer_of(window), point, direction)
    passed = lower_pass(
        window.problem,
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
    del direction
    notes = (*passed.notes, *step_notes(method.order, point.optimizer_state))
    if upper is None:
        return take(window, point, passed), HypergradientResult(None, product, after, notes=notes)
    with torch.no_grad():
        hypergradient = tree.add(product, upper.direct)
    result = HypergradientResult(
        upper.loss, hypergradient, after, notes=(*notes, *upper.notes), upper_aux=upper.aux
    )
    used = _finite(hypergradient, upper.loss, passed.grad_norm)
    if memory is not None and after is not memory and not used and method.direction_decay:
        # φ will not move, and neither does the average: θ is where it was, and so is v. (A v alone
        # is of no more use: the next upper step computes it again.)
        again = _upper_gradient(window, point, upper_batch, random)
        without_(again.lower, _average(memory), method.direction_decay)
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
) -> UpperGradient:
    with random_state.rewound_to(random, point.lower_params):
        return upper_gradient(window.problem, point.lower_params, window.upper_params, batch)


def _finite(*values: Tree) -> bool:
    return all(bool(torch.isfinite(tree.norm(value))) for value in values)
