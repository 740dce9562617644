"""Order lower-first in place: a step of a single example, and v consumed leaf by leaf.

The lower backward pass leaves g = ∇ℓ, which becomes h = (∂θ'/∂g) g in the same memory while the
step is taken. The upper backward pass at θ' then hands over v = ∇L_upper leaf by leaf, of which
only ``⟨μ, g⟩ = ⟨v, h⟩`` is wanted, since ∂θ'/∂g is diagonal. Each leaf of v is freed at once, so
that θ, g and the two moments are all that is as large as θ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import optree
import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import tree
from bilevel.autodiff import random_state
from bilevel.autodiff.gradient import UpperGradient, as_leaves
from bilevel.hypergradients.base import HypergradientResult
from bilevel.hypergradients.one_step import OneStep, step_notes
from bilevel.hypergradients.update_derivative import Identity
from bilevel.lower.mixed_product import mixed_product
from bilevel.lower.steps import LowerSteps, Point, Window
from bilevel.optimizers.point import Leaves
from bilevel.problem import Batch, Params, Problem
from bilevel.resident.pieces import Gathered, Gathering, Piece
from bilevel.resident.plain import single_pass, single_step
from bilevel.resident.streamed import streamed_upper_gradient
from bilevel.tree import Tree


def take_window(
    window: Window, method: OneStep, upper_batch: Batch | None
) -> tuple[LowerSteps, HypergradientResult | None]:
    """Take the lower steps of a window in place and differentiate through the last one.

    Args:
        window: The window, of a single example per step.
        method: The hypergradient, in order lower-first.
        upper_batch: None: lower steps alone, which are the same bit for bit.
    """
    point, passes, skipped = window.start, [], list[int]()
    result = None
    last = len(window.batches) - 1
    for index, (batch,) in enumerate(window.batches):
        differentiate = upper_batch is not None and index == last
        upper_params = tree.map(Tensor.detach, window.upper_params)
        if differentiate:
            upper_params = as_leaves(upper_params)
        random = random_state.capture(point.lower_params)
        single = single_pass(window, upper_params, point, batch)
        exact = differentiate and not isinstance(method.update_derivative, Identity)
        before = point.optimizer_state
        taken = single_step(window, point, single, slopes=exact)
        point = taken.point
        passes.append(taken.passed)
        if taken.skipped:
            skipped.append(index)
        elif differentiate:
            with random_state.rewound_to(random, point.lower_params):
                upper, dot = dotted_upper_gradient(
                    window.problem, point, upper_params, upper_batch, single.grads, single.gathered
                )
            slope = dot if exact else -dot
            micro = replace(single.micro, dots=_known(slope))
            passed = replace(taken.passed, micro_batches=[micro])
            product = mixed_product(
                window.problem, method.route, passed, point.lower_params, upper_params, None
            )
            with torch.no_grad():
                hypergradient = tree.add(product, upper.direct)
            notes = (*passed.notes, *step_notes(method.order, window, before), *upper.notes)
            result = HypergradientResult(
                upper.loss, hypergradient, None, notes=notes, upper_aux=upper.aux
            )
    steps = LowerSteps(point, tuple(passes), tuple(skipped))
    return steps, None if skipped else result


def dotted_upper_gradient(
    problem: Problem,
    point: Point,
    upper_params: Params,
    batch: Batch,
    along: Tree,
    gathered: Gathered | None = None,
) -> tuple[UpperGradient, Float[Tensor, ""]]:
    """Return the upper loss, its gradient in φ, and ⟨v, along⟩, v = ∇_θ L_upper never being whole.

    Args:
        problem: The losses.
        point: θ and the optimizer's state.
        upper_params: φ, requiring grad.
        batch: The upper batch.
        along: Like θ; None leaves are zero.
        gathered: The same in pieces. v is then put together likewise.

    Raises:
        ValueError: The loss is not a scalar.
    """
    leaves, structure = optree.tree_flatten(point.lower_params, none_is_leaf=True)
    directions: Leaves = structure.flatten_up_to(along)
    # In the order of ``tree.vdot``.
    terms: list[list[Tensor]] = [[] for _ in leaves]

    @torch.no_grad()
    def multiply(v: Piece) -> None:
        wide = v.flat.to(tree.wide_dtype(v.flat.dtype))  # v is not needed afterwards
        assert gathered is not None
        terms[v.leaves[0]].append(wide.mul_(gathered.in_order_of(v, directions, leaves)).sum())

    gathering = None if gathered is None else Gathering(gathered.keys, multiply)

    def receive(index: int, v: Tensor) -> None:
        direction = directions[index]
        if direction is None:
            return
        if gathering is None:
            terms[index].extend(tree.dot_terms(direction, v))
        else:
            gathering.add(index, v)

    upper = streamed_upper_gradient(problem, point, upper_params, batch, receive)
    if gathering is not None:
        gathering.finish()
    return upper, tree.total([term for one in terms for term in one], like=point.lower_params)


def _known(dot: Float[Tensor, ""]) -> Callable[[Any], Float[Tensor, "1"]]:
    return lambda _: dot[None]
