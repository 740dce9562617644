"""The route by double backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.autodiff import random_state
from bilevel.autodiff.gradient import as_leaves, gradients
from bilevel.autodiff.kernels import differentiable_kernels
from bilevel.lower.micro_batch import GradientGraph, MicroBatch
from bilevel.lower.route import DerivativeRequest, Product
from bilevel.lower.second_order import (
    check_twice_differentiable,
    chosen,
    derivative_through,
    put,
    zeros_for_none,
)
from bilevel.problem import Params, Problem, ReweightingProblem, lower_value
from bilevel.routes.base import PlainBackward
from bilevel.tree import Tree


@dataclass(frozen=True)
class Reverse(PlainBackward):
    """Double backward: ∇_θ L with a graph, then its vector-Jacobian product. The reference.

    Cost: 5F and more. Memory: 3 to 4 times the activations. Attention runs with its MATH kernel.
    """

    def loss_slopes(
        self,
        problem: ReweightingProblem[Any, Any, Any],
        micro: MicroBatch,
        lower_params: Params,
        direction: Tree,
    ) -> None:
        """Return None: φ is reached through the graph of the gradient."""

    def gradient_derivative(self, request: DerivativeRequest) -> Sequence[Tensor | None]:
        """Return ⟨∇_θ L, d⟩ differentiated through a graph of the gradient, about 9F for both."""
        return double_backward(request)

    def hessian_product(
        self, problem: Problem, micro: MicroBatch, lower_params: Params, upper_params: Params
    ) -> Product:
        """Return v -> ∇²_θθ L v; the gradient's graph is kept from the first product on."""
        fixed = tree.map(Tensor.detach, upper_params)
        return _kept_graph(problem, micro, lower_params, fixed)


def double_backward(at: DerivativeRequest) -> Sequence[Tensor | None]:
    """Return the derivative of the wanted gradients through a graph of ∇_θ L."""
    with (
        differentiable_kernels(),
        torch.enable_grad(),
        random_state.rewound_to(at.micro.random, at.lower_params),
    ):
        params, upper = as_leaves(at.lower_params), as_leaves(at.upper_params)
        loss, _ = lower_value(at.problem, params, upper, at.micro.batch)
        wanted = tree.map(lambda leaf, _: leaf, params, at.direction)
        grads = gradients([loss], wanted, create_graph=True)
        check_twice_differentiable(tree.leaves(grads))
        return derivative_through(GradientGraph(grads, params, upper), at)


def _kept_graph(
    problem: Problem, micro: MicroBatch, lower_params: Params, upper_params: Params
) -> Product:
    """Return v -> ∇²_θθ L v through one graph of ∇_θ L, made at the first product."""
    kept: list[tuple[Params, Tree]] = []

    def record() -> tuple[Params, Tree]:
        if not kept:
            with torch.enable_grad(), random_state.rewound_to(micro.random, lower_params):
                params = as_leaves(lower_params)
                loss, _ = lower_value(problem, params, upper_params, micro.batch)
                grads = gradients([loss], params, create_graph=True)
                check_twice_differentiable(tree.leaves(grads))
                kept.append((params, grads))
        return kept[0]

    def product(vector: Tree) -> Tree:
        with differentiable_kernels():
            params, grads = record()
            terms = tree.leaves(tree.map(lambda g, v: (g, v.to(g.dtype)), grads, vector))
            curved = [index for index in range(0, len(terms), 2) if terms[index].requires_grad]
            wanted = chosen(params, vector)
            if not curved or not wanted:
                return tree.zeros_like(vector)
            products = torch.autograd.grad(
                [terms[index] for index in curved],
                wanted,
                [terms[index + 1] for index in curved],
                allow_unused=True,
                retain_graph=True,
            )
        return put(vector, zeros_for_none(products, wanted))

    return product
