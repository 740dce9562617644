"""A lower step with a graph to the point before it, so that autograd goes through several at once.

On small problems, where starting operations costs more than their arithmetic, one backward pass
through all steps of a window takes less time than one for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

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


def connects(optimizer: DifferentiableOptimizer) -> TypeGuard[ElementwiseOptimizer]:
    """Return whether ``connected_update`` applies to an optimizer."""
    return isinstance(optimizer, ElementwiseOptimizer)


def with_graph(params: Params) -> Params:
    """Return the parameters, those without a graph as new leaves that require grad."""
    return tree.map(
        lambda leaf: leaf if leaf.requires_grad else leaf.detach().requires_grad_(), params
    )


def connected_update(
    optimizer: ElementwiseOptimizer, grads: Tree, state: OptimizerState, params: Params
) -> tuple[Params, OptimizerState]:
    """Return what ``optimizer.update`` returns, the same bits, with a graph to all arguments.

    What autograd finds is ``optimizer.vjp``: that of the operations themselves for ``SGD``, whose
    update is linear, and the optimizer's own for the others, whose operations give NaN where a
    second moment is 0.

    Args:
        optimizer: Takes the step.
        grads: The gradient with its graph; every leaf has one.
        state: The state before the step, with or without a graph.
        params: The parameters before the step.
    """
    if type(optimizer) is SGD and not optimizer.differentiate_clip:
        with torch.enable_grad():
            return _descended(optimizer, grads, state, params)
    inputs, structure = optree.tree_flatten((grads, *state[1:], params))
    taken = _Taken(optimizer, structure, state.steps)
    with torch.enable_grad():
        outputs = _Update.apply(taken, *inputs)  # type: ignore[no-untyped-call]
    first, second, new_params = optree.tree_unflatten(taken.outputs, outputs)
    return new_params, OptimizerState(state.steps + 1, first, second)


def _descended(
    optimizer: SGD, grads: Tree, state: OptimizerState, params: Params
) -> tuple[Params, OptimizerState]:
    """Return what ``SGD.update`` returns; a plain step in two calls for all leaves."""
    lr = optimizer.plain_rate(state)
    leaves, structure = optree.tree_flatten(params, none_is_leaf=True)
    columns = structure.flatten_up_to(grads)
    moved = [index for index, grad in enumerate(columns) if grad is not None]
    old, by = [leaves[index] for index in moved], [columns[index] for index in moved]
    if not isinstance(lr, float) or any(map(_unlike, old, by)):
        return optimizer.update(grads, state, params)
    for index, new in zip(moved, foreach_add(old, foreach_mul(by, -lr)), strict=True):
        leaves[index] = new
    return structure.unflatten(leaves), state._replace(steps=state.steps + 1)


def _unlike(leaf: Tensor, grad: Tensor) -> bool:
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
