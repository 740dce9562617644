"""Products with the Hessian of the lower loss: v -> H v, H = ∇²_θθ L(θ, φ)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel import tree
from bilevel.autodiff import random_state
from bilevel.autodiff.gradient import as_leaves, gradients
from bilevel.autodiff.kernels import differentiable_kernels
from bilevel.lower.lower_pass import LowerPass
from bilevel.lower.micro_batch import MicroBatch
from bilevel.lower.second_order import chosen, filled, gradient_derivative, put
from bilevel.problem import Params, Problem, lower_value
from bilevel.routes import Reverse, Route
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
        route: How, see `gradient_derivative`. `Jvp`, and every route that knows nothing of
            Hessians: forward over reverse, 9F per product (F a forward pass). `Reverse`: the
            gradient's graph is kept from the first product on and differentiated again in each, 3F
            once and 6F per product, 3 to 4 times the activations of all micro-batches.
            `CentralDifference`: 6F, and an error of its own.
        passed: The lower pass at θ and φ.
        lower_params: θ.
        upper_params: φ.

    Raises:
        RuntimeError: A torch operation has no derivative of the kind that the route needs.
    """
    if isinstance(route, Reverse):
        upper = tree.map(Tensor.detach, upper_params)
        parts = [_kept_graph(problem, m, lower_params, upper) for m in passed.micro_batches]
    else:
        parts = [_anew(problem, route, m, lower_params, upper_params) for m in passed.micro_batches]

    def product(vector: Tree) -> Tree:
        total = tree.map(lambda _: None, vector)
        for share, part in zip(passed.shares, parts, strict=True):
            total = tree.axpy(share, part(vector), total)
        return total

    return product


def _anew(
    problem: Problem, route: Route, micro: MicroBatch, lower_params: Params, upper_params: Params
) -> Product:
    def product(vector: Tree) -> Tree:
        return gradient_derivative(
            problem, route, micro, lower_params, upper_params, vector, upper=False
        ).lower

    return product


def _kept_graph(
    problem: Problem, micro: MicroBatch, lower_params: Params, upper_params: Params
) -> Product:
    kept: list[tuple[Params, Tree]] = []

    def record() -> tuple[Params, Tree]:
        if not kept:
            with torch.enable_grad(), random_state.replay(micro.random, lower_params):
                params = as_leaves(lower_params)
                loss, _ = lower_value(problem, params, upper_params, micro.batch)
                kept.append((params, gradients([loss], params, create_graph=True)))
        return kept[0]

    def product(vector: Tree) -> Tree:
        with differentiable_kernels():
            params, grads = record()
            terms = tree.leaves(tree.map(lambda g, v: (g, v.to(g.dtype)), grads, vector))
            curved = [index for index in range(0, len(terms), 2) if terms[index].requires_grad]
            wanted = chosen(params, vector)
            if not curved or not wanted:
                return tree.zeros_like(vector)
            found = torch.autograd.grad(
                [terms[index] for index in curved],
                wanted,
                [terms[index + 1] for index in curved],
                allow_unused=True,
                retain_graph=True,
            )
        return put(vector, filled(found, wanted))

    return product
