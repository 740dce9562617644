"""The mixed product ∂/∂φ ⟨∇_θ L(θ, φ), μ⟩, from what the lower pass left or by another pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bilevel import tree
from bilevel.autodiff import random_state
from bilevel.autodiff.finite_difference import central_difference, moving
from bilevel.autodiff.gradient import gradients
from bilevel.autodiff.kernels import differentiable_kernels
from bilevel.lower.lower_pass import LowerPass, MicroBatch
from bilevel.lower.second_order import gradient_derivative
from bilevel.problem import Batch, Params, Problem, ReweightingProblem
from bilevel.routes import CentralDifference, Reverse, Route
from bilevel.tree import Tree


def mixed_product(
    problem: Problem,
    route: Route,
    passed: LowerPass,
    lower_params: Params,
    upper_params: Params,
    direction: Tree,
) -> Tree:
    """Return ∂/∂φ ⟨∇_θ L(θ, φ), μ⟩ of the whole step; None where φ has no influence.

    Args:
        problem: The losses.
        route: How. Where the lower pass has noted that it does not apply, `Jvp` steps in.
        passed: The lower pass at θ and φ.
        lower_params: θ.
        upper_params: φ, the very leaves that were given to the lower pass.
        direction: μ like θ; None leaves are zero.

    Raises:
        RuntimeError: A torch operation has no derivative of the kind that the route needs.
    """
    product: Tree = tree.map(lambda _: None, upper_params)
    separable = isinstance(problem, ReweightingProblem) and problem.detach_features
    weights, cotangents = [], []
    for micro, share in zip(passed.micro_batches, passed.shares, strict=True):
        if separable and not isinstance(route, Reverse):
            dots = micro.dots or _losses_derivative(problem, route, micro, lower_params)
            assert micro.weights is not None
            weights.append(micro.weights)
            cotangents.append((dots(direction) * share).to(micro.weights.dtype))
            continue
        term = gradient_derivative(
            problem, route, micro, lower_params, upper_params, direction, lower=False
        ).upper
        term = tree.map(lambda one, leaf: one.to(leaf.dtype), term, upper_params)
        product = tree.axpy(share, term, product)
    return tree.add(product, gradients(weights, upper_params, cotangents))


def _losses_derivative(
    problem: Problem, route: Route, micro: MicroBatch, lower_params: Params
) -> Callable[[Tree], Tensor]:
    """Return μ -> ⟨μ, ∇ℓ_i⟩ / size: the losses' derivative along μ."""
    assert isinstance(problem, ReweightingProblem)
    assert micro.losses is not None
    like = (micro.losses,)

    def losses(params: Params, batch: Batch) -> tuple[Tensor]:
        with random_state.replay(micro.random, lower_params):
            return (problem.losses(params, batch)[0],)

    def dots(direction: Tree) -> Tensor:
        with torch.no_grad():
            if isinstance(route, CentralDifference):
                found = central_difference(
                    route, losses, lower_params, direction, micro.batch, like
                )
            else:
                with differentiable_kernels():
                    found = _tangent(
                        lambda params: losses(params, micro.batch), lower_params, direction, like
                    )
            return found[0] / micro.size

    return dots


def _tangent(
    function: Callable[[Params], tuple[Tensor, ...]],
    params: Params,
    direction: Tree,
    like: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Derivative along μ by forward-mode differentiation; zeros like `like` if nothing moves."""
    rebuild, primals, tangents = moving(params, direction)
    if not primals:
        return tuple(torch.zeros_like(value) for value in like)

    def moved(*leaves: Tensor) -> tuple[Tensor, ...]:
        return function(rebuild(leaves))

    tangents = tuple(
        tangent.to(primal.dtype) for primal, tangent in zip(primals, tangents, strict=True)
    )
    result: tuple[Tensor, ...] = torch.func.jvp(moved, primals, tangents)[1]
    return result
