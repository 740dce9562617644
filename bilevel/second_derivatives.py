"""Both second derivatives of the lower loss along one direction, in one pass over the batch.

`curvature` has the Hessian's products alone, for many directions at one point; `mixed_product`
the mixed derivative alone, for less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel import random_state, tree
from bilevel.finite_difference import central_difference, moving
from bilevel.gradient import as_leaves, gradients
from bilevel.kernels import differentiable_kernels
from bilevel.lower_pass import LowerPass
from bilevel.micro_batch import MicroBatch
from bilevel.problem import Batch, Params, Problem, lower_value
from bilevel.routes import CentralDifference, Jvp, Reverse
from bilevel.tree import Tree


class SecondDerivatives(NamedTuple):
    """``∂²L/∂θ² d``, like d, and ``∂²L/∂φ∂θ d``, like φ; None leaves are zero."""

    lower: Tree
    upper: Tree


def second_derivatives(
    problem: Problem,
    route: Jvp | Reverse | CentralDifference,
    passed: LowerPass,
    lower_params: Params,
    upper_params: Params,
    direction: Tree,
) -> SecondDerivatives:
    """Return the derivative along d, a direction in θ, of (∇_θ L, ∇_φ L) over the micro-batches.

    Args:
        problem: The losses.
        route: `Jvp`: forward over reverse, about 9F (F a forward pass), memory of a backward pass
            twice over. Reverse over forward would do, were it right: torch's is silently wrong for
            `layer_norm`. `Reverse`: ⟨∇_θ L, d⟩ differentiated through a graph of the gradient,
            about 9F, 3 to 4 times the activations. `CentralDifference`: two ordinary gradients, 6F
            and the memory of one. The first two run attention with its MATH kernel.
        passed: The lower pass at θ and φ, for its micro-batches; its gradients are not looked at.
        lower_params: θ.
        upper_params: φ.
        direction: d like θ. None leaves stand still and have no product (a parameter that the
            step did not use).

    Raises:
        RuntimeError: A torch operation has no derivative of the kind that the route needs.

    Source: Pearlmutter 1994; both products together: MixFlow-MG (arXiv 2505.00793).
    """
    upper_params = tree.map(Tensor.detach, upper_params)
    total = SecondDerivatives(
        tree.map(lambda _: None, direction), tree.map(lambda _: None, upper_params)
    )
    for micro, share in zip(passed.micro_batches, passed.shares, strict=True):
        arguments = problem, micro, lower_params, upper_params, direction
        if isinstance(route, CentralDifference):
            lower, upper = _difference(route, *arguments)
        else:
            derivative = _twice_reversed if isinstance(route, Reverse) else _tangent
            with differentiable_kernels():
                lower, upper = derivative(*arguments)
        with torch.no_grad():
            total = SecondDerivatives(
                tree.axpy(share, _put(direction, lower), total.lower),
                tree.axpy(share, _put(upper_params, upper), total.upper),
            )
    return total


# What follows returns the products leaf by leaf, of θ where there is a direction and of φ.


def _tangent(
    problem: Problem,
    micro: MicroBatch,
    lower_params: Params,
    upper_params: Params,
    direction: Tree,
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    rebuild, primals, along = moving(lower_params, direction)
    upper = tree.leaves(upper_params)
    if not primals:
        return (), [None] * len(upper)

    def loss(lower_leaves: Sequence[Tensor], upper_leaves: Sequence[Tensor]) -> Tensor:
        with random_state.replay(micro.random, lower_params):
            params, found = rebuild(lower_leaves), _put(upper_params, upper_leaves)
            return lower_value(problem, params, found, micro.batch)[0]

    def gradient(*lower_leaves: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        found: tuple[Sequence[Tensor], Sequence[Tensor]]
        found = torch.func.grad(loss, (0, 1))(lower_leaves, upper)
        return found

    tangents = tuple(t.to(p.dtype) for t, p in zip(along, primals, strict=True))
    with torch.no_grad():
        found: tuple[Sequence[Tensor], Sequence[Tensor]]
        found = torch.func.jvp(gradient, primals, tangents)[1]
    return found


def _twice_reversed(
    problem: Problem,
    micro: MicroBatch,
    lower_params: Params,
    upper_params: Params,
    direction: Tree,
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    with torch.enable_grad(), random_state.replay(micro.random, lower_params):
        params, upper = as_leaves(lower_params), as_leaves(upper_params)
        loss, _ = lower_value(problem, params, upper, micro.batch)
        wanted = _chosen(params, direction), tree.leaves(upper)
        first = gradients([loss], wanted[0], create_graph=True)
        pairs = [
            (grad, along.to(grad.dtype))
            for grad, along in zip(first, tree.leaves(direction), strict=True)
            if grad is not None
        ]
        found: tuple[list[Tensor | None], list[Tensor | None]]
        found = gradients([grad for grad, _ in pairs], wanted, [along for _, along in pairs])
    return found


def _difference(
    route: CentralDifference,
    problem: Problem,
    micro: MicroBatch,
    lower_params: Params,
    upper_params: Params,
    direction: Tree,
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    def gradient(params: Params, inputs: tuple[Params, Batch]) -> tuple[Tensor, ...]:
        with torch.enable_grad(), random_state.replay(micro.random, lower_params):
            params, upper = as_leaves(params), as_leaves(inputs[0])
            loss, _ = lower_value(problem, params, upper, inputs[1])
            wanted = [*_chosen(params, direction), *tree.leaves(upper)]
            found = gradients([loss], wanted)
        return tuple(
            torch.zeros_like(leaf) if one is None else one
            for leaf, one in zip(wanted, found, strict=True)
        )

    lower = _chosen(lower_params, direction)
    like = [*lower, *tree.leaves(upper_params)]
    inputs = upper_params, micro.batch
    found = central_difference(route, gradient, lower_params, direction, inputs, like)
    narrow = [one.to(leaf.dtype) for one, leaf in zip(found, like, strict=True)]
    return narrow[: len(lower)], narrow[len(lower) :]


def _chosen(params: Params, direction: Tree) -> list[Tensor]:
    """Return the parameters that the direction has an entry for."""
    return tree.leaves(tree.map(lambda leaf, _: leaf, params, direction))


def _put(like: Tree, values: Sequence[Tensor | None]) -> Tree:
    """Return the values in the places of the leaves of `like`."""
    remaining = iter(values)
    return tree.map(lambda _: next(remaining), like)
