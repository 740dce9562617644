"""A window of a small problem through one graph of all its steps, as TorchOpt and higher take it.

Where starting operations costs more than their arithmetic, one graph from the upper loss to φ takes
less time than a sweep from step to step, and most of what is left is the bookkeeping around a step.
So this is a loop of its own beside ``bilevel.lower.steps``, without any: whatever is out of the
ordinary (a number that is not finite, a loss that ignores θ, an operation without a second
derivative) makes it give up, and the window is taken from its start by the loop that has a word for
it. Its steps are the same bit for bit.
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
from bilevel.autodiff.gradient import as_leaves, gradients, ignored_lower, leaf_gradients
from bilevel.autodiff.random_state import RandomState
from bilevel.autodiff.second_derivative import has_second_derivative
from bilevel.autodiff.torch_private import foreach_norm
from bilevel.hypergradients.base import HypergradientResult, Taken
from bilevel.lower.connected_step import connected_update, connects
from bilevel.lower.kept_graph import is_small
from bilevel.lower.lower_pass import LowerPass, are_constant, unused_parameters
from bilevel.lower.micro_batch import LossTerms, MicroBatch, loss_terms
from bilevel.lower.route import Route
from bilevel.lower.steps import LowerSteps, Point, Window, take_steps
from bilevel.problem import Batch, Params, detached, upper_value
from bilevel.profiling import part


@part("window through one graph")
def through_one_graph(window: Window, upper_batch: Batch, route: Route, steps: int) -> Taken | None:
    """Return the lower steps of a window, and the hypergradient through the last of them.

    Args:
        window: The window.
        upper_batch: The batch of the upper loss, which draws the random numbers of the last step.
        route: By which the steps before these are taken. It must be one that takes the gradient of
            the weighted loss as autograd has it.
        steps: Through how many of the last steps the derivative goes.

    Returns:
        None if the window has several micro-batches, ranks, numbers of the optimizer that come from
        φ or another optimizer than those of ``bilevel.optimizers``, if it is not small or not to be
        looked at, or if something came up in it. The torch generators are then as they were.
    """
    constant = len(window.batches) - steps
    if (
        window.hyperparameters is not None
        or window.collective.ranks > 1
        or window.guard.usual is not None
        or not connects(window.optimizer)
        or any(len(micro_batches) != 1 for micro_batches in window.batches[constant:])
        or not is_small(window.start.lower_params, window.batches[constant:])
    ):
        return None
    random = random_state.capture(window.start.lower_params)
    try:
        found = _taken(window, upper_batch, route, constant)
    except RuntimeError:  # Also one of the problem's own, which comes up again.
        found = None
    if found is None:
        random_state.restore(random)
    return found


def _taken(window: Window, upper_batch: Batch, route: Route, constant: int) -> Taken | None:
    """Return the window as it was taken; None if something came up."""
    before = LowerSteps(window.start, ())
    if constant:
        before = take_steps(replace(window, batches=window.batches[:constant]), route)
        if before.skipped:
            return None
    problem, upper_params = window.problem, as_leaves(window.upper_params)
    start, state = as_leaves(before.end.lower_params), before.end.optimizer_state
    # θ is taken apart once: to walk through a tree takes as long as a few operations.
    leaves, structure = optree.tree_flatten(start, none_is_leaf=True)
    last, all_terms, all_grads = len(window.batches) - 1, [], []
    assert connects(window.optimizer)
    with torch.enable_grad():
        for number, (batch,) in enumerate(window.batches[constant:], start=constant):
            if number == last:
                random = random_state.capture(start)
            terms = loss_terms(problem, structure.unflatten(leaves), upper_params, batch)
            weights = [] if terms.weights is None else [terms.weights]
            if (
                not terms.size
                or are_constant(problem, weights, upper_params)
                or not has_second_derivative(terms.loss, _present(leaves))
            ):
                return None
            grads = leaf_gradients([terms.loss], leaves, create_graph=True)
            if all(grad is None for grad in grads):
                return None
            leaves, state = connected_update(window.optimizer, grads, state, leaves, structure)
            all_terms.append(terms)
            all_grads.append(grads)
        with torch.no_grad():
            norms = _norms(all_grads)
            if not math.isfinite(sum(norms)):
                return None
        params: Params = structure.unflatten(leaves)
        with random_state.rewound_to(random, start):
            loss, aux = upper_value(problem, params, upper_params, upper_batch)
            wanted = params, upper_params, None if window.initial is None else start
            v, total, start_bar = gradients([loss], wanted)
    if window.initial is not None:
        total = tree.add(total, window.pulled_back(start_bar, {}))
    passes = [
        LowerPass(None, [_summary(terms, random)], norm, _unused(start, grads, structure))
        for terms, grads, norm in zip(all_terms, all_grads, norms, strict=True)
    ]
    end: Point = tree.map(Tensor.detach, Point(params, state))
    return LowerSteps(end, (*before.passes, *passes)), HypergradientResult(
        loss.detach(), total, None, notes=ignored_lower(params, v), upper_aux=detached(aux)
    )


def _present(leaves: Sequence[Tensor | None]) -> list[Tensor]:
    return [leaf for leaf in leaves if leaf is not None]


def _unused(
    start: Params, grads: Sequence[Tensor | None], structure: optree.PyTreeSpec
) -> tuple[str, ...]:
    """Return ``unused_parameters``, which is nothing where every leaf has a gradient."""
    if all(grad is not None for grad in grads):
        return ()
    return unused_parameters(start, structure.unflatten(grads))


def _norms(grads: Sequence[Sequence[Tensor | None]]) -> Sequence[Tensor]:
    """Return ``tree.norm`` of each, the same bits, by one call for the leaves of all."""
    rows = [_present(one) for one in grads]
    leaves = [leaf for row in rows for leaf in row]
    wide = {tree.wide_dtype(leaf.dtype) for leaf in leaves}
    if len(wide) > 1:
        return [tree.norm(row) for row in rows]
    of_leaves = torch.stack(foreach_norm(leaves, dtype=wide.pop()))
    return foreach_norm(of_leaves.split([len(row) for row in rows]))


def _summary(terms: LossTerms, random: RandomState) -> MicroBatch:
    """Return the figures of a step; see ``MicroBatch.summary``."""
    loss, losses, weights, aux, size = terms
    return MicroBatch(
        None,
        random,
        size,
        loss.detach(),
        None if losses is None else losses.detach(),
        None if weights is None else weights.detach(),
        aux=None if aux is None else detached(aux),
    )
