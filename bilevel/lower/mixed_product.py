"""The mixed product ∂/∂φ ⟨∇_θ L(θ, φ), μ⟩, from what the lower pass left or by another pass."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from bilevel import tree
from bilevel.autodiff.gradient import gradients
from bilevel.lower.lower_pass import LowerPass
from bilevel.lower.route import DerivativeRequest, Route
from bilevel.lower.second_order import gradient_derivative
from bilevel.problem import Params, Problem, dropped, is_separable
from bilevel.profiling import part
from bilevel.tree import Tree


@part("mixed product")
def mixed_product(
    problem: Problem,
    route: Route,
    passed: LowerPass,
    lower_params: Params,
    upper_params: Params,
    direction: Tree,
) -> Tree:
    """Return ∂/∂φ ⟨∇_θ L(θ, φ), μ⟩ of the step of all ranks; None where φ has no influence.

    With weights that are a function of φ alone (``is_separable``) it is
    ``Σ_i ∂w_i/∂φ ⟨μ, ∇ℓ_i⟩ / size``: one backward pass through the weights of all micro-batches,
    once the slopes of the losses along μ are known.

    Args:
        problem: The losses.
        route: How, unless the lower pass has left the products already.
        passed: The lower pass at θ and φ.
        lower_params: θ.
        upper_params: φ, the very leaves that were given to the lower pass.
        direction: μ like θ; None leaves are zero.

    Raises:
        RuntimeError: A torch operation has no derivative of the kind that the route needs.
    """
    product: Tree = tree.map(lambda _: None, upper_params)
    weights: list[Float[Tensor, " _"]] = []
    cotangents: list[Float[Tensor, " _"]] = []
    for micro, share in zip(passed.micro_batches, passed.shares, strict=True):
        slopes = None
        if micro.dots is not None:
            slopes = micro.dots(direction)
        elif is_separable(problem) and micro.graph is None:
            slopes = route.loss_slopes(problem, micro, lower_params, direction)
        if slopes is not None:
            assert micro.weights is not None
            assert micro.losses is not None
            slopes = slopes.masked_fill(dropped(micro.weights.detach(), micro.losses), 0.0)
            weights.append(micro.weights)
            cotangents.append((slopes * share).to(micro.weights.dtype))
            continue
        request = DerivativeRequest(
            problem, micro, lower_params, upper_params, direction, lower=False
        )
        term = gradient_derivative(route, request).upper
        term = tree.map(lambda one, leaf: one.to(leaf.dtype), term, upper_params)
        product = tree.axpy(share, term, product)
    product = tree.add(product, gradients(weights, upper_params, cotangents))
    return passed.collective.sum(product, upper_params, sparse=True)
