"""Both second derivatives of the lower loss along one direction, in one pass over the batch.

`curvature` has the Hessian's products alone, for many directions at one point; `mixed_product`
the mixed derivative alone, for less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel import tree
from bilevel.lower.lower_pass import LowerPass
from bilevel.lower.second_order import SecondDerivatives, gradient_derivative
from bilevel.problem import Params, Problem
from bilevel.routes import CentralDifference, Jvp, Reverse
from bilevel.tree import Tree


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
        route: How; equations, cost, memory and errors in `gradient_derivative`.
        passed: The lower pass at θ and φ, for its micro-batches; its gradients are not looked at.
        lower_params: θ.
        upper_params: φ, the very leaves that were given to the lower pass.
        direction: d like θ. None leaves stand still and have no product (a parameter that the
            step did not use).

    Returns:
        Both parts, in the precision of θ and φ.
    """
    total = SecondDerivatives(
        tree.map(lambda _: None, direction), tree.map(lambda _: None, upper_params)
    )
    like = SecondDerivatives(lower_params, upper_params)
    for micro, share in zip(passed.micro_batches, passed.shares, strict=True):
        found = gradient_derivative(problem, route, micro, lower_params, upper_params, direction)
        with torch.no_grad():
            total = tree.axpy(share, tree.map(_as, found, like), total)
    return total


def _as(product: Tensor, leaf: Tensor) -> Tensor:
    return product.to(leaf.dtype)
