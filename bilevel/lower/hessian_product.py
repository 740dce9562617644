"""Products with the Hessian of the lower loss: v -> H v, H = ∇²_θθ L(θ, φ)."""

from __future__ import annotations

from bilevel import tree
from bilevel.lower.lower_pass import LowerPass
from bilevel.lower.route import Product, Route
from bilevel.problem import Params, Problem
from bilevel.tree import Tree


def hessian_product(
    problem: Problem, route: Route, passed: LowerPass, lower_params: Params, upper_params: Params
) -> Product:
    """Return v -> H v of the lower loss over the micro-batches of a step, those of all ranks.

    With the share n_m / N of the examples of each::

        H v = Σ_m (n_m / N) d/dε ∇_θ L(θ + ε v, φ; batch_m)  at ε = 0

    None leaves of v stand still and have no product: H is then the block of the other leaves.
    Each micro-batch draws the random numbers of the pass, so H is the Hessian of
    one function, and symmetric. Features of a ``ReweightingProblem`` that are detached are data:
    the weights do not move with θ, which is what makes H symmetric there.

    Args:
        problem: The losses.
        route: How, see ``bilevel.routes``; cost in F, forward passes. ``Jvp``, and every route
            without Hessian products of its own: forward over reverse, 9F per product.
            ``Reverse``: the gradient's graph is kept from the first product on and differentiated
            again in each, 3F once and 6F per product, 3 to 4 times the activations of all
            micro-batches.
            ``CentralDifference``: 6F, and an error of its own.
        passed: The lower pass at θ and φ.
        lower_params: θ.
        upper_params: φ.

    Raises:
        RuntimeError: A torch operation has no derivative of the kind that the route needs.
    """
    parts = [
        route.hessian_product(problem, micro, lower_params, upper_params)
        for micro in passed.micro_batches
    ]

    def product(vector: Tree) -> Tree:
        total = tree.map(lambda _: None, vector)
        for share, part in zip(passed.shares, parts, strict=True):
            total = tree.axpy(share, part(vector), total)
        return passed.collective.sum(total, vector)

    return product
