"""Products with the Hessian of the lower loss: v -> H v, H = ∇²_θθ L(θ, φ)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bilevel import random_state, tree
from bilevel.finite_difference import central_difference, moving
from bilevel.gradient import as_leaves, gradients
from bilevel.kernels import differentiable_kernels
from bilevel.lower_pass import LowerPass
from bilevel.micro_batch import MicroBatch
from bilevel.problem import Batch, Params, Problem, ReweightingProblem, lower_value
from bilevel.routes import CentralDifference, Reverse, Route
from bilevel.tree import Tree

Product = Callable[[Tree], Tree]


def hessian_product(
    problem: Problem, route: Route, passed: LowerPass, lower_params: Params, upper_params: Params
) -> Product:
    """Return v -> H v of the lower loss over the micro-batches of a step::

        H v = Σ_m (n_m / N) d/dε ∇_θ L(θ + ε v, φ; batch_m)  at ε = 0

    None leaves of v stand still and have no product: H is then the block of the other leaves.
    Each micro-batch replays the random state from which the pass was run, so H is the Hessian of
    one function, and symmetric. Features of a `ReweightingProblem` that are detached are data: the
    weights do not move with θ, which is what makes H symmetric there.

    Args:
        problem: The losses.
        route: `Jvp` (and every route that knows nothing of Hessians): forward over reverse, 9F per
            product (F a forward pass), memory of one backward pass twice over. `Reverse`: the
            gradient's graph is kept from the first product on and differentiated again in each, 3F
            once and 6F per product, 3 to 4 times the activations of all micro-batches.
            `CentralDifference`: two gradients at θ ± ε v, 6F, fused attention, and an error of its
            own. The first two run attention with its MATH kernel.
        passed: The lower pass at θ and φ.
        lower_params: θ.
        upper_params: φ.

    Raises:
        RuntimeError: A torch operation has no derivative of the kind that the route needs.

    Source: Pearlmutter 1994 for the products; forward over reverse as in MixFlow-MG (arXiv
    2505.00793). Reverse over forward would do, were torch's not silently wrong for `layer_norm`.
    """
    upper = tree.map(Tensor.detach, upper_params)
    make = _kept_graph if isinstance(route, Reverse) else _forward_over_reverse
    if isinstance(route, CentralDifference):
        parts = [_difference(problem, route, m, lower_params, upper) for m in passed.micro_batches]
    else:
        parts = [make(problem, micro, lower_params, upper) for micro in passed.micro_batches]

    def product(vector: Tree) -> Tree:
        total = tree.map(lambda _: None, vector)
        for share, part in zip(passed.shares, parts, strict=True):
            total = tree.axpy(share, part(vector), total)
        return total

    return product


def _forward_over_reverse(
    problem: Problem, micro: MicroBatch, lower_params: Params, upper_params: Params
) -> Product:
    def product(vector: Tree) -> Tree:
        rebuild, primals, tangents = moving(lower_params, vector)
        if not primals:
            return vector

        def loss(*leaves: Tensor) -> Tensor:
            with random_state.replay(micro.random, lower_params):
                return _lower_loss(problem, micro, rebuild(leaves), upper_params, micro.batch)

        gradient = torch.func.grad(loss, tuple(range(len(primals))))
        along = tuple(t.to(p.dtype) for p, t in zip(primals, tangents, strict=True))
        with torch.no_grad(), differentiable_kernels():
            return _put(vector, torch.func.jvp(gradient, primals, along)[1])

    return product


def _kept_graph(
    problem: Problem, micro: MicroBatch, lower_params: Params, upper_params: Params
) -> Product:
    kept: list[tuple[Params, Tree]] = []

    def record() -> tuple[Params, Tree]:
        if not kept:
            with torch.enable_grad(), random_state.replay(micro.random, lower_params):
                params = as_leaves(lower_params)
                loss = _lower_loss(problem, micro, params, upper_params, micro.batch)
                kept.append((params, gradients([loss], params, create_graph=True)))
        return kept[0]

    def product(vector: Tree) -> Tree:
        with differentiable_kernels():
            params, grads = record()
            terms = tree.leaves(tree.map(lambda g, v: (g, v.to(g.dtype)), grads, vector))
            curved = [index for index in range(0, len(terms), 2) if terms[index].requires_grad]
            wanted = _chosen(params, vector)
            if not curved or not wanted:
                return tree.zeros_like(vector)
            found = torch.autograd.grad(
                [terms[index] for index in curved],
                wanted,
                [terms[index + 1] for index in curved],
                allow_unused=True,
                retain_graph=True,
            )
        return _put(vector, _filled(found, wanted))

    return product


def _difference(
    problem: Problem,
    route: CentralDifference,
    micro: MicroBatch,
    lower_params: Params,
    upper_params: Params,
) -> Product:
    def product(vector: Tree) -> Tree:
        def gradient(params: Params, inputs: tuple[Params, Batch]) -> tuple[Tensor, ...]:
            with torch.enable_grad(), random_state.replay(micro.random, lower_params):
                params = as_leaves(params)
                loss = _lower_loss(problem, micro, params, *inputs)
                wanted = _chosen(params, vector)
                return tuple(_filled(gradients([loss], wanted), wanted))

        inputs, like = (upper_params, micro.batch), _chosen(lower_params, vector)
        return _put(vector, central_difference(route, gradient, lower_params, vector, inputs, like))

    return product


def _lower_loss(
    problem: Problem, micro: MicroBatch, params: Params, upper_params: Params, batch: Batch
) -> Tensor:
    """Return the loss, with the weights of the pass where θ does not move them."""
    if isinstance(problem, ReweightingProblem) and problem.detach_features:
        assert micro.weights is not None
        return (micro.weights.detach() * problem.losses(params, batch)[0]).mean()
    return lower_value(problem, params, upper_params, batch)[0]


def _chosen(params: Params, vector: Tree) -> list[Tensor]:
    """Return the parameters that the vector has an entry for."""
    return tree.leaves(tree.map(lambda leaf, _: leaf, params, vector))


def _filled(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(leaf) if one is None else one
        for leaf, one in zip(like, found, strict=True)
    ]


def _put(vector: Tree, found: Sequence[Tensor]) -> Tree:
    """Return the product's leaves in the places of the vector's."""
    rest = iter(found)
    return tree.map(lambda _: next(rest), vector)
