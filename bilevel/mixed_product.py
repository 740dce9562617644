"""The mixed product ∂/∂φ ⟨∇_θ L(θ, φ), μ⟩, from what the lower pass left or by another pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import optree
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilevel import random_state, tree
from bilevel.gradient import as_leaves, gradients
from bilevel.lower_pass import LowerPass, MicroBatch
from bilevel.problem import Params, Problem, ReweightingProblem, lower_value
from bilevel.routes import CentralDifference, Reverse, Route
from bilevel.tree import Tree

# (function of θ returning a tuple of tensors, θ, μ) -> derivative of the function along μ
Derivative: TypeAlias = Callable[
    [Callable[[Params], tuple[Tensor, ...]], Params, Tree], tuple[Tensor, ...]
]

# What torch's messages about missing derivatives have in common.
UNSUPPORTED = ("forward AD", "forward-mode", "functorch", "jvp", "double backward")


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
    derivative = _difference(route) if isinstance(route, CentralDifference) else _tangent
    separable = isinstance(problem, ReweightingProblem) and problem.detach_features
    weights, cotangents = [], []
    for micro, share in zip(passed.micro_batches, passed.shares, strict=True):
        if separable and not isinstance(route, Reverse):
            dots = micro.dots or _losses_derivative(problem, derivative, micro, lower_params)
            assert micro.weights is not None
            weights.append(micro.weights)
            cotangents.append((dots(direction) * share).to(micro.weights.dtype))
            continue
        with differentiable_kernels():
            if isinstance(route, Reverse):
                term = _twice_reversed(problem, micro, lower_params, upper_params, direction)
            else:
                term = _gradient_derivative(
                    problem, route, micro, lower_params, upper_params, direction
                )
        product = tree.axpy(share, term, product)
    return tree.add(product, gradients(weights, upper_params, cotangents))


@contextmanager
def differentiable_kernels() -> Iterator[None]:
    """Run attention with its only kernel that has forward-mode and second derivatives.

    Raises:
        RuntimeError: Some other operation lacks them, with torch's message and what to do.
    """
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            # torch itself compiles some of its forward-mode formulas with its deprecated compiler.
            warnings.filterwarnings("ignore", message=r".*torch\.jit", category=DeprecationWarning)
            yield
    except (NotImplementedError, RuntimeError) as error:
        text = str(error)
        if not any(part in text for part in UNSUPPORTED):
            raise
        raise RuntimeError(
            f"a torch operation lacks the derivative that this route needs: {text}. Use "
            "attn_implementation='eager' (or torch's MATH attention kernel) and plain torch "
            "operations, or choose the route Ghost(), PerExample() or CentralDifference()"
        ) from error


def _losses_derivative(
    problem: Problem, derivative: Derivative, micro: MicroBatch, lower_params: Params
) -> Callable[[Tree], Tensor]:
    """Return μ -> ⟨μ, ∇ℓ_i⟩ / size: the losses' derivative along μ."""
    assert isinstance(problem, ReweightingProblem)

    def dots(direction: Tree) -> Tensor:
        def losses(params: Params) -> tuple[Tensor]:
            with random_state.replay(micro.random, lower_params):
                return (problem.losses(params, micro.batch)[0],)

        with torch.no_grad(), differentiable_kernels():
            return derivative(losses, lower_params, direction)[0] / micro.size

    return dots


def _gradient_derivative(
    problem: Problem,
    route: Route,
    micro: MicroBatch,
    lower_params: Params,
    upper_params: Params,
    direction: Tree,
) -> Tree:
    """Return the derivative of ∇_φ L along μ: forward over reverse.

    Reverse over forward would do, were it right: torch's is silently wrong for `layer_norm`.
    """
    present, structure = optree.tree_flatten(tree.map(Tensor.detach, upper_params))

    def loss(params: Params, *leaves: Tensor) -> Tensor:
        with random_state.replay(micro.random, lower_params):
            return lower_value(problem, params, structure.unflatten(leaves), micro.batch)[0]

    def transformed(params: Params) -> tuple[Tensor, ...]:
        every = tuple(range(1, len(present) + 1))
        found: tuple[Tensor, ...] = torch.func.grad(loss, every)(params, *present)
        return found

    def recorded(params: Params) -> tuple[Tensor, ...]:
        leaves = as_leaves(present)
        with torch.enable_grad():
            found = gradients([loss(params, *leaves)], leaves)
        return tuple(
            torch.zeros_like(leaf) if gradient is None else gradient
            for leaf, gradient in zip(leaves, found, strict=True)
        )

    if isinstance(route, CentralDifference):
        return structure.unflatten(_difference(route)(recorded, lower_params, direction))
    return structure.unflatten(_tangent(transformed, lower_params, direction))


def _twice_reversed(
    problem: Problem,
    micro: MicroBatch,
    lower_params: Params,
    upper_params: Params,
    direction: Tree,
) -> Tree:
    """Return the gradient with respect to φ of ⟨∇_θ L, μ⟩, by a graph of the gradient."""
    with torch.enable_grad(), random_state.replay(micro.random, lower_params):
        params, upper = as_leaves(lower_params), as_leaves(upper_params)
        loss, _ = lower_value(problem, params, upper, micro.batch)
        grads = gradients([loss], params, create_graph=True)
        pairs = tree.map(lambda gradient, along: (gradient, along), grads, direction)
        flat = tree.leaves(pairs)
        return gradients(flat[::2], upper, flat[1::2])


def _tangent(
    function: Callable[[Params], tuple[Tensor, ...]], params: Params, direction: Tree
) -> tuple[Tensor, ...]:
    """Derivative along μ by forward-mode differentiation."""
    rebuild, primals, tangents = _moving(params, direction)

    def moved(*leaves: Tensor) -> tuple[Tensor, ...]:
        return function(rebuild(leaves))

    if not primals:
        return tuple(torch.zeros_like(value) for value in function(params))
    result: tuple[Tensor, ...] = torch.func.jvp(moved, primals, tangents)[1]
    return result


def _difference(route: CentralDifference) -> Derivative:
    """Derivative along μ by central differences.

    ε ‖μ‖ = relative_step · ‖θ‖ (or relative_step, if θ = 0), norms over the parameters that move.
    """

    def difference(
        function: Callable[[Params], tuple[Tensor, ...]], params: Params, direction: Tree
    ) -> tuple[Tensor, ...]:
        rebuild, primals, tangents = _moving(params, direction)
        length = tree.norm(tangents)
        if length == 0:
            return tuple(torch.zeros_like(value) for value in function(params))
        relative = route.relative_step
        if relative is None:
            relative = max(torch.finfo(leaf.dtype).eps for leaf in primals) ** (1 / 3)
        reach = tree.norm(primals)
        step = relative * (reach if reach > 0 else torch.ones_like(reach)) / length
        ahead, behind = (
            function(
                rebuild(
                    [
                        p + (sign * step).to(p.dtype) * d
                        for p, d in zip(primals, tangents, strict=True)
                    ]
                )
            )
            for sign in (1.0, -1.0)
        )
        return tuple((a - b) / (2.0 * step) for a, b in zip(ahead, behind, strict=True))

    return difference


def _moving(
    params: Params, direction: Tree
) -> tuple[Callable[[Sequence[Tensor]], Params], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the parameters that have a direction, their directions, and how to put them back."""
    leaves, structure = optree.tree_flatten(params, none_is_leaf=True)
    directions = structure.flatten_up_to(direction)
    moving = [index for index, along in enumerate(directions) if along is not None]

    def rebuild(values: Sequence[Tensor]) -> Params:
        filled = [leaf if leaf is None else leaf.detach() for leaf in leaves]
        for index, value in zip(moving, values, strict=True):
            filled[index] = value
        return structure.unflatten(filled)

    return (
        rebuild,
        tuple(leaves[index].detach() for index in moving),
        tuple(directions[index].to(leaves[index].dtype) for index in moving),
    )
