"""How the gradient of the lower loss changes along a direction in θ, for one micro-batch.

The three ways to compute it, and the one place where each is written; `curvature` asks for the θ
part, `mixed_product` for the φ part, `second_derivatives` for both together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel import tree
from bilevel.autodiff import random_state
from bilevel.autodiff.finite_difference import central_difference, moving
from bilevel.autodiff.gradient import as_leaves, gradients
from bilevel.autodiff.kernels import differentiable_kernels
from bilevel.lower.micro_batch import MicroBatch
from bilevel.problem import Batch, Params, Problem, ReweightingProblem, lower_value, weighted_mean
from bilevel.routes import CentralDifference, Reverse, Route
from bilevel.tree import Tree


class SecondDerivatives(NamedTuple):
    """``∂²L/∂θ² d``, like d, and ``∂²L/∂φ∂θ d``, like φ; None leaves are zero."""

    lower: Tree
    upper: Tree


def gradient_derivative(
    problem: Problem,
    route: Route,
    micro: MicroBatch,
    lower_params: Params,
    upper_params: Params,
    direction: Tree,
    *,
    lower: bool = True,
    upper: bool = True,
) -> SecondDerivatives:
    """Return ``d/dε (∇_θ L, ∇_φ L)(θ + ε d, φ)`` at ε = 0.

    Features of a `ReweightingProblem` that are detached are data: neither they nor the weights
    move with θ.

    Args:
        problem: The losses.
        route: `Reverse`: ⟨∇_θ L, d⟩ differentiated through a graph of the gradient, about 9F (F a
            forward pass), 3 to 4 times the activations. `CentralDifference`: two ordinary
            gradients at θ ± ε d, 6F and the memory of one, an error of its own; in float32 or
            wider whatever the precision of θ. Any other: forward over reverse, about 9F, memory of
            a backward pass twice over. (Reverse over forward would do, were it right: torch's is
            silently wrong for `layer_norm`.) The first and the last run attention with its MATH
            kernel.
        micro: What the lower pass left of the micro-batch. For the φ part of a problem with
            detached features by `CentralDifference` its weights must have their graph to φ.
        lower_params: θ.
        upper_params: φ, the very leaves that were given to the lower pass.
        direction: d like θ. None leaves stand still and have no product.
        lower: Whether the θ part is wanted; otherwise it is Nones, and costs nothing.
        upper: Whether the φ part is wanted, likewise.

    Raises:
        RuntimeError: A torch operation has no derivative of the kind that the route needs.

    Source: Pearlmutter 1994; both products together: MixFlow-MG (arXiv 2505.00793).
    """
    along = direction if lower else tree.map(lambda _: None, direction)
    phi = upper_params if upper else tree.map(lambda _: None, upper_params)
    nothing = SecondDerivatives(
        tree.map(lambda _: None, direction), tree.map(lambda _: None, upper_params)
    )
    if not tree.leaves(direction) or not tree.leaves((along, phi)):
        return nothing
    at = _Asked(problem, micro, lower_params, upper_params, direction, along, phi)
    if isinstance(route, CentralDifference):
        separable = isinstance(problem, ReweightingProblem) and problem.detach_features
        found = (_weighted_difference if separable else _difference)(at, route)
    else:
        with differentiable_kernels():
            found = (_twice_reversed if isinstance(route, Reverse) else _tangent)(at)
    values = iter(found)
    result = tree.map(lambda _: next(values), (along, phi))
    return SecondDerivatives(*result)


@dataclass(frozen=True, eq=False)
class _Asked:
    """What is asked for, and where. `along` and `phi` are the direction and φ with leaves where
    a product is wanted; the functions below return these leaf by leaf, `along`'s first."""

    problem: Problem
    micro: MicroBatch
    lower_params: Params
    upper_params: Params
    direction: Tree
    along: Tree
    phi: Tree


def _tangent(at: _Asked) -> Sequence[Tensor | None]:
    rebuild, primals, tangents = moving(at.lower_params, at.direction)
    fixed = tree.map(Tensor.detach, at.upper_params)
    present = tuple(leaf.detach() for leaf in tree.leaves(at.phi))

    def loss(lower_leaves: Sequence[Tensor], upper_leaves: Sequence[Tensor]) -> Tensor:
        with random_state.replay(at.micro.random, at.lower_params):
            upper = put(fixed, upper_leaves) if present else fixed
            return lower_value(at.problem, rebuild(lower_leaves), upper, at.micro.batch)[0]

    wanted = (0, 1) if tree.leaves(at.along) and present else 0 if tree.leaves(at.along) else 1

    def gradient(*lower_leaves: Tensor) -> tuple[Tensor, ...]:
        found = torch.func.grad(loss, wanted)(lower_leaves, present)
        return (*found[0], *found[1]) if wanted == (0, 1) else tuple(found)

    moved = tuple(t.to(p.dtype) for t, p in zip(tangents, primals, strict=True))
    with torch.no_grad():
        found: Sequence[Tensor] = torch.func.jvp(gradient, primals, moved)[1]
    return found


def _twice_reversed(at: _Asked) -> Sequence[Tensor | None]:
    with torch.enable_grad(), random_state.replay(at.micro.random, at.lower_params):
        params, upper = as_leaves(at.lower_params), as_leaves(at.upper_params)
        loss, _ = lower_value(at.problem, params, upper, at.micro.batch)
        first = gradients([loss], chosen(params, at.direction), create_graph=True)
        pairs = [
            (grad, d.to(grad.dtype))
            for grad, d in zip(first, tree.leaves(at.direction), strict=True)
            if grad is not None
        ]
        wanted = [*chosen(params, at.along), *chosen(upper, at.phi)]
        found: list[Tensor | None]
        found = gradients([grad for grad, _ in pairs], wanted, [d for _, d in pairs])
    return found


def _difference(at: _Asked, route: CentralDifference) -> Sequence[Tensor | None]:
    def gradient(params: Params, inputs: tuple[Params, Batch]) -> tuple[Tensor, ...]:
        with torch.enable_grad(), random_state.replay(at.micro.random, at.lower_params):
            params, upper = as_leaves(params), as_leaves(inputs[0])
            loss, _ = lower_value(at.problem, params, upper, inputs[1])
            wanted = [*chosen(params, at.along), *chosen(upper, at.phi)]
            return filled(gradients([loss], wanted), wanted)

    like = [*chosen(at.lower_params, at.along), *tree.leaves(at.phi)]
    inputs = tree.map(Tensor.detach, at.upper_params), at.micro.batch
    return central_difference(route, gradient, at.lower_params, at.direction, inputs, like)


def _weighted_difference(at: _Asked, route: CentralDifference) -> Sequence[Tensor | None]:
    """With the weights of the pass, which θ does not move, for the θ part; and their own
    derivative times that of the losses for the φ part."""
    problem = at.problem
    assert isinstance(problem, ReweightingProblem)
    assert at.micro.weights is not None
    assert at.micro.losses is not None
    weights = at.micro.weights.detach()

    def values(params: Params, batch: Batch) -> tuple[Tensor, ...]:
        with torch.enable_grad(), random_state.replay(at.micro.random, at.lower_params):
            params = as_leaves(params)
            losses = problem.losses(params, batch)[0]
            wanted = chosen(params, at.along)
            found = filled(gradients([weighted_mean(weights, losses)], wanted), wanted)
        return (*found, losses.detach())

    like = [*chosen(at.lower_params, at.along), at.micro.losses]
    *found, slopes = central_difference(
        route, values, at.lower_params, at.direction, at.micro.batch, like
    )
    cotangent = (slopes / at.micro.size).to(at.micro.weights.dtype)
    return [*found, *gradients([at.micro.weights], tree.leaves(at.phi), [cotangent])]


def chosen(params: Params, like: Tree) -> list[Tensor]:
    """Return the parameters where `like` has a leaf."""
    return tree.leaves(tree.map(lambda leaf, _: leaf, params, like))


def filled(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return zeros where there is nothing."""
    return tuple(
        torch.zeros_like(leaf) if one is None else one
        for leaf, one in zip(like, found, strict=True)
    )


def put(like: Tree, values: Sequence[Tensor | None]) -> Tree:
    """Return the values in the places of the leaves of `like`."""
    remaining = iter(values)
    return tree.map(lambda _: next(remaining), like)
