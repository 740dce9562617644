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
from bilevel.autodiff.gradient import IGNORES_LOWER, UpperGradient, as_leaves, dense
from bilevel.autodiff.recomputation import watched_backward
from bilevel.hypergradients.base import HypergradientResult
from bilevel.hypergradients.one_step import OneStep, step_notes
from bilevel.hypergradients.update_derivative import Identity
from bilevel.lower.mixed_product import mixed_product
from bilevel.lower.steps import LowerSteps, Point, Window
from bilevel.problem import Batch, Params, Problem, detached, upper_value
from bilevel.resident.plain import single_pass, single_step
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
                    window.problem, point, upper_params, upper_batch, single.grads
                )
            slope = dot if exact else -dot
            micro = replace(single.micro, dots=_known(slope))
            passed = replace(taken.passed, micro_batches=[micro])
            product = mixed_product(
                window.problem, method.route, passed, point.lower_params, upper_params, None
            )
            with torch.no_grad():
                hypergradient = tree.add(product, upper.direct)
            notes = (*passed.notes, *step_notes(method.order, before), *upper.notes)
            result = HypergradientResult(
                upper.loss, hypergradient, None, notes=notes, upper_aux=upper.aux
            )
    steps = LowerSteps(point, tuple(passes), tuple(skipped))
    return steps, None if skipped else result


def dotted_upper_gradient(
    problem: Problem, point: Point, upper_params: Params, batch: Batch, along: Tree
) -> tuple[UpperGradient, Float[Tensor, ""]]:
    """Return the upper loss, its gradient in φ, and ⟨v, along⟩, v = ∇_θ L_upper never being whole.

    Raises:
        ValueError: The loss is not a scalar.
    """
    with torch.enable_grad():
        lower, upper = as_leaves(point.lower_params), as_leaves(upper_params)
        leaves, structure = optree.tree_flatten(lower, none_is_leaf=True)
        directions = structure.flatten_up_to(along)
        # In the order of ``tree.vdot``.
        terms: list[list[Tensor]] = [[] for _ in leaves]
        reached: list[int] = []
        for index, (leaf, direction) in enumerate(zip(leaves, directions, strict=True)):
            if leaf is not None:
                hook = _hook(index, direction, terms[index], reached)
                leaf.register_post_accumulate_grad_hook(hook)
        loss, aux = upper_value(problem, lower, upper, batch)
        wanted = [*tree.leaves(lower), *tree.leaves(upper)]
        if wanted and loss.requires_grad:
            watched_backward([loss], wanted, accumulate=True)
    direct: Tree = optree.tree_map(lambda leaf: dense(leaf.grad), upper)
    notes = () if reached or not tree.leaves(lower) else (IGNORES_LOWER,)
    dot = tree.total([term for found in terms for term in found], like=point.lower_params)
    return UpperGradient(loss.detach(), None, direct, detached(aux), notes), dot


def _hook(
    index: int, direction: Tensor | None, terms: list[Tensor], reached: list[int]
) -> Callable[[Tensor], None]:
    # Knows nothing of the leaf that it hangs on, whose memory a cycle would hold.
    def use(leaf: Tensor) -> None:
        v, leaf.grad = dense(leaf.grad), None
        assert v is not None
        reached.append(index)
        if direction is not None:
            terms.extend(tree.dot_terms(direction, v))

    return use


def _known(dot: Float[Tensor, ""]) -> Callable[[Any], Float[Tensor, "1"]]:
    return lambda _: dot[None]
