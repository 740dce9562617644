"""Backward passes whose gradients are handed over leaf by leaf."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import optree
import torch
from torch import Tensor

from bilevel import tree
from bilevel.autodiff.gradient import UpperGradient, as_leaves, dense, ignored_lower
from bilevel.autodiff.recomputation import watched_backward
from bilevel.lower.steps import Point
from bilevel.optimizers.point import Leaves
from bilevel.problem import Batch, Params, Problem, detached, upper_value
from bilevel.profiling import part
from bilevel.tree import Tree


@part("upper gradient")
def streamed_upper_gradient(
    problem: Problem,
    point: Point,
    upper_params: Params,
    batch: Batch,
    receive: Callable[[int, Tensor], None],
) -> UpperGradient:
    """Return the upper loss and its gradient in φ; v = ∇_θ L_upper is handed over leaf by leaf.

    Args:
        problem: The losses.
        point: θ and the optimizer's state.
        upper_params: φ, requiring grad.
        batch: The upper batch.
        receive: See ``streamed_backward``.

    Raises:
        ValueError: The loss is not a scalar.
    """
    reached: list[int] = []

    def noted(index: int, v: Tensor) -> None:
        reached.append(index)
        receive(index, v)

    with torch.enable_grad():
        lower, upper = as_leaves(point.lower_params), as_leaves(upper_params)
        loss, aux = upper_value(problem, lower, upper, batch)
        leaves: Leaves = optree.tree_leaves(lower, none_is_leaf=True)
        streamed_backward(loss, leaves, tree.leaves(upper), noted)
    direct: Tree = optree.tree_map(lambda leaf: dense(leaf.grad), upper)
    notes = ignored_lower(lower, loss if reached else None)
    return UpperGradient(loss.detach(), None, direct, detached(aux), notes)


def streamed_backward(
    loss: Tensor,
    leaves: Leaves,
    others: Sequence[Tensor],
    receive: Callable[[int, Tensor], None],
) -> None:
    """Differentiate a loss, and hand over the gradient of each leaf as soon as it is whole.

    It is not held here any longer, so that there need never be all of them.

    Args:
        loss: A scalar.
        leaves: Autograd leaves that require grad, or None.
        others: Further ones, whose gradients are left in their ``grad``.
        receive: Called with the index of a leaf and its gradient, for those that the loss reaches.

    Raises:
        RecomputationError: A part of the model was recomputed with other parameters.
    """
    for index, leaf in enumerate(leaves):
        if leaf is not None:
            leaf.register_post_accumulate_grad_hook(_hook(index, receive))
    wanted = [*(leaf for leaf in leaves if leaf is not None), *others]
    if wanted and loss.requires_grad:
        watched_backward([loss], wanted, accumulate=True)


def _hook(index: int, receive: Callable[[int, Tensor], None]) -> Callable[[Tensor], None]:
    # Knows nothing of the leaf that it hangs on, whose memory a cycle would hold.
    def use(leaf: Tensor) -> None:
        gradient, leaf.grad = dense(leaf.grad), None
        assert gradient is not None
        receive(index, gradient)

    return use
