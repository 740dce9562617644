"""What most routes have in common: a plain backward pass, and Hessian products one at a time."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from bilevel.lower.gradient_sum import GradientSum
from bilevel.lower.micro_batch import MicroBatch, PassContext, detached_backward
from bilevel.lower.route import BackwardPass, DerivativeRequest, Product, Route
from bilevel.lower.second_order import gradient_derivative
from bilevel.problem import Params, Problem
from bilevel.tree import Tree


class PlainBackward:
    """A lower pass as autograd has it; the products are left to other passes.

    For a route that adds ``loss_slopes`` and ``gradient_derivative``.
    """

    per_example: ClassVar[bool] = False
    needs_direction: ClassVar[bool] = False
    second_order: ClassVar[bool] = True

    def backward_pass(self, context: PassContext, total: GradientSum) -> BackwardPass:
        """Return the backward pass of the weighted loss."""
        return partial(detached_backward, context)

    def hessian_product(
        self: Route,
        problem: Problem,
        micro: MicroBatch,
        lower_params: Params,
        upper_params: Params,
    ) -> Product:
        """Return v -> ∇²_θθ L v, each product by a ``gradient_derivative`` of its own."""

        def product(vector: Tree) -> Tree:
            request = DerivativeRequest(
                problem, micro, lower_params, upper_params, vector, upper=False
            )
            return gradient_derivative(self, request).lower

        return product
