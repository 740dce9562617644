"""A lower step with a graph to the point before it, so that autograd goes through several at once.

On small problems, where starting operations costs more than their arithmetic, one backward pass
through all steps of a window takes less time than one for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

import optree
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bilevel import tree
from bilevel.autodiff.torch_private import foreach_add, foreach_mul
from bilevel.optimizers.base import DifferentiableOptimizer, OptimizerState
from bilevel.optimizers.elementwise import ElementwiseOptimizer
from bilevel.optimizers.optimizers import SGD
from bilevel.problem import Params
from bilevel.tree import Tree

Leaves: TypeAlias = Sequence[Tensor | None]


def connects(optimizer: DifferentiableOptimizer) -> TypeGuard[ElementwiseOptimizer]:
    """Return whether ``connected_update`` applies to an optimizer."""
    return isinstance(optimizer, ElementwiseOptimizer)


def with_graph(params: Params) -> Params:
    """Return the parameters, those without a graph as new leaves that require grad."""
    return tree.map(
        lambda leaf: leaf if leaf.requires_grad else leaf.detach().requires_grad_(), params
    )


def connected_update(
    optimizer: ElementwiseOptimizer,
    grads: Leaves,
    state: OptimizerState,
    params: Leaves,
    structure: optree.PyTreeSpec,
) -> tuple[Leaves, OptimizerState]:
    """Return what ``optimizer.update`` returns, the same bits, with a graph to all arguments.

    What autograd finds is ``optimizer.vjp``: that of the operations themselves for ``SGD``, whose
    update is linear, and the optimizer's own for the others, whose operations give NaN where a
    second moment is 0.

    Args:
        optimizer: Takes the step.
        grads: The leaves of the gradient, with its graph; None where it has none.
        state: The state before the step, with or without a graph.
        params: The leaves of the parameters before the step.
        structure: That of the tree whose leaves these are.

    Returns:
        The leaves of the parameters after the step, and the state.
    """
    with torch.enable_grad():
        if type(optimizer) is SGD and not optimizer.differentiate_clip:
            lr = optimizer.plain_rate(state)
            if isinstance(lr, float) and not any(map(_unlike, params, grads)):
                return _descended(grads, lr, params), state._replace(steps=state.steps + 1)
            tree_of_params: Params = structure.unflatten(params)
            moved, state = optimizer.update(structure.unflatten(grads), state, tree_of_params)
            return optree.tree_leaves(moved, none_is_leaf=True), state
        trees = structure.unflatten(grads), *state[1:], structure.unflatten(params)
        inputs, of_inputs = optree.tree_flatten(trees)
        taken = _Taken(optimizer, of_inputs, state.steps)
        outputs = _Update.apply(taken, *inputs)  # type: ignore[no-untyped-call]
    first, second, moved = optree.tree_unflatten(taken.outputs, outputs)
    state = OptimizerState(state.steps + 1, first, second)
    return optree.tree_leaves(moved, none_is_leaf=True), state


def _descended(grads: Leaves, lr: float, params: Leaves) -> Leaves:
    """Return the leaves after a plain step of ``SGD``, in two calls for all."""
    leaves = list(params)
    pairs = zip(params, grads, strict=True)
    moved = [(p, g) for p, g in pairs if p is not None and g is not None]
    steps = foreach_mul([g for _, g in moved], -lr)
    places = (index for index, grad in enumerate(grads) if grad is not None)
    for index, new in zip(places, foreach_add([p for p, _ in moved], steps), strict=True):
        leaves[index] = new
    return leaves


def _unlike(leaf: Tensor | None, grad: Tensor | None) -> bool:
    if leaf is None or grad is None:
        return grad is not None
    return leaf.dtype is not grad.dtype or type(leaf) is not Tensor


@dataclass(eq=False)
class _Taken:
    """What a step has beside tensors; ``outputs`` is the structure of its results."""

    optimizer: ElementwiseOptimizer
    inputs: optree.PyTreeSpec
    steps: Tensor
    outputs: optree.PyTreeSpec | None = None

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[Tree, OptimizerState, Tree]:
        grads, first, second, params = optree.tree_unflatten(self.inputs, inputs)
        return grads, OptimizerState(self.steps, first, second), params


class _Update(torch.autograd.Function):
    """The update, and its ``vjp`` as the derivative."""

    @staticmethod
    def forward(ctx: Any, taken: _Taken, *inputs: Tensor) -> tuple[Tensor, ...]:
        params, state = taken.optimizer.update(*taken.arguments(inputs))
        outputs, taken.outputs = optree.tree_flatten((*state[1:], params))
        given = {id(tensor) for tensor in inputs}  # a leaf without a gradient stays what it is
        outputs = [out.clone() if id(out) in given else out for out in outputs]
        ctx.taken = taken
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *bars: Tensor | None) -> tuple[Tensor | None, ...]:
        taken = ctx.taken
        arguments = taken.arguments(ctx.saved_tensors)
        first, second, params_bar = optree.tree_unflatten(taken.outputs, bars)
        state_bar = OptimizerState(taken.steps, first, second)
        grads, state, params = taken.optimizer.vjp(*arguments, params_bar, state_bar)
        cotangents = optree.tree_leaves((grads, *state[1:], params))
        return None, *cotangents
