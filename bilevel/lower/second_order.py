"""How the gradient of the lower loss changes along a direction in θ, in θ and in φ together.

``hessian_product`` has the Hessian's products alone, for many directions at one point;
``mixed_product`` the mixed derivative alone, for less. How one micro-batch is differentiated is up
to the route.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel import tree
from bilevel.autodiff.gradient import dense, gradients
from bilevel.autodiff.second_derivative import ONCE_DIFFERENTIABLE
from bilevel.lower.lower_pass import LowerPass
from bilevel.lower.micro_batch import GradientGraph
from bilevel.lower.route import DerivativeRequest, Route
from bilevel.problem import Params, Problem
from bilevel.tree import T, Tree


class SecondDerivatives(NamedTuple):
    """``∂²L/∂θ² d``, like d, and ``∂²L/∂φ∂θ d``, like φ; None leaves are zero."""

    lower: Tree
    upper: Tree


def gradient_derivative(route: Route, request: DerivativeRequest) -> SecondDerivatives:
    """Return what is asked for, by a route.

    Raises:
        RuntimeError: A torch operation has no derivative of the kind that the route needs.

    Source: Pearlmutter 1994; both products together: MixFlow-MG (arXiv 2505.00793).
    """
    wanted = request.lower_wanted, request.upper_wanted
    if not tree.leaves(request.direction) or not tree.leaves(wanted):
        return SecondDerivatives(
            tree.map(lambda _: None, request.direction),
            tree.map(lambda _: None, request.upper_params),
        )
    if (graph := request.micro.graph) is not None:
        try:
            return SecondDerivatives(*put(wanted, derivative_through(graph, request)))
        except RuntimeError:  # an operation, of fused attention say, has no second derivative
            pass
    return SecondDerivatives(*put(wanted, route.gradient_derivative(request)))


def second_derivatives(
    problem: Problem,
    route: Route,
    passed: LowerPass,
    lower_params: Params,
    upper_params: Params,
    direction: Tree,
) -> SecondDerivatives:
    """Return the derivative along d, a direction in θ, of (∇_θ L, ∇_φ L) over all micro-batches.

    Args:
        problem: The losses.
        route: How.
        passed: The lower pass at θ and φ, for its micro-batches; its gradients are not looked at.
        lower_params: θ.
        upper_params: φ, the very leaves that were given to the lower pass.
        direction: d like θ. None leaves stand still and have no product (a parameter that the
            step did not use).

    Returns:
        Both parts, in the precision of θ and φ.
    """
    total: SecondDerivatives | None = None
    like = SecondDerivatives(lower_params, upper_params)
    for micro, share in zip(passed.micro_batches, passed.shares, strict=True):
        request = DerivativeRequest(problem, micro, lower_params, upper_params, direction)
        both = gradient_derivative(route, request)
        with torch.no_grad():
            both = tree.map(_in_precision_of, both, like)
            if share != 1.0:
                both = tree.scale(share, both)
            total = both if total is None else tree.add(both, total)
    lower = tree.map(lambda leaf, _: leaf, lower_params, direction)
    own = (None, None) if total is None else total
    return SecondDerivatives(
        passed.collective.sum(own[0], lower),
        passed.collective.sum(own[1], upper_params, sparse=True),
    )


def _in_precision_of(product: Tensor, leaf: Tensor) -> Tensor:
    return product.to(leaf.dtype)


def derivative_through(graph: GradientGraph, at: DerivativeRequest) -> Sequence[Tensor | None]:
    """Return ⟨∇_θ L, d⟩ differentiated with respect to what is wanted: double backward.

    Uses the graph up.

    Raises:
        RuntimeError: An operation of the loss cannot be differentiated twice.
    """
    outputs: list[Tensor] = []
    cotangents: list[Tensor] = []

    def add(grad: Tensor, d: Tensor) -> None:
        outputs.append(grad)
        cotangents.append(d.to(grad.dtype))

    tree.map(add, graph.grads, at.direction)
    wanted = [
        *(chosen(graph.lower_params, at.direction) if at.lower else ()),
        *(tree.leaves(graph.upper_params) if at.upper else ()),
    ]
    return gradients(outputs, wanted, cotangents)


def check_twice_differentiable(grads: Sequence[Tensor | None]) -> None:
    """Raise RuntimeError if an operation's backward pass has cut the graph of the gradient.

    What ``once_differentiable`` leaves in its place fails only if it is reached, and with the graph
    cut it never is: the derivative would silently be zero.
    """
    pending = [grad.grad_fn for grad in grads if grad is not None]
    seen = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        if type(node).__name__ == "Error":
            raise RuntimeError(ONCE_DIFFERENTIABLE)
        seen.add(node)
        pending.extend(following for following, _ in node.next_functions)


def chosen(params: Params, like: Tree) -> list[Tensor]:
    """Return the parameters where ``like`` has a leaf."""
    return tree.leaves(tree.map(lambda leaf, _: leaf, params, like))


def zeros_for_none(values: Sequence[Tensor | None], like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the values, with zeros like those of ``like`` in place of each None."""
    return tuple(
        torch.zeros_like(leaf) if value is None else value
        for leaf, value in zip(like, values, strict=True)
    )


def put(like: T, values: Sequence[Tensor | None]) -> T:
    """Return the values, dense, in the places of the leaves of ``like``."""
    remaining = iter(values)
    return tree.map(lambda _: dense(next(remaining)), like)
