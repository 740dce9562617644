"""The route for single examples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import tree
from bilevel.autodiff.gradient import as_leaves, gradients
from bilevel.autodiff.random_state import RandomState
from bilevel.lower.gradient_sum import GradientStream, GradientSum
from bilevel.lower.micro_batch import Backward, MicroBatch, PassContext, weighted_batch
from bilevel.lower.route import BackwardPass
from bilevel.problem import Batch, Params
from bilevel.routes.jvp import ForwardProducts
from bilevel.tree import Tree


@dataclass(frozen=True)
class Dot(ForwardProducts):
    """⟨μ, ∇ℓ⟩ with the gradient that the lower backward pass computes anyway.

    For micro-batches of one example and detached features. The backward pass runs on the plain
    loss and its gradient is then scaled by the weight, so a weight of 0 is no special case.
    Cost: one dot product. Memory: none for one micro-batch or order upper-first; a copy of the
    gradients per micro-batch for lower-first.
    """

    per_example: ClassVar[bool] = True
    second_order: ClassVar[bool] = False

    def backward_pass(self, context: PassContext, total: GradientSum) -> BackwardPass:
        """Return the backward pass of one example; streamed, if its gradient need not be kept."""
        if context.differentiate and context.direction is None:
            return partial(kept_backward, context)
        direction = context.direction if context.differentiate else None
        return partial(_streamed_backward, context, GradientStream(total, direction))


def kept_backward(context: PassContext, batch: Batch, random: RandomState) -> Backward:
    """Differentiate the unweighted loss; the gradient is kept for the products."""
    params = as_leaves(context.lower_params)
    losses, weights = single_loss(context, params, batch)
    grads = gradients([losses.mean()], params)
    micro = weighted_batch(batch, random, losses, weights)
    return Backward(grads, single_example(context, micro, grads), kept=True)


def _streamed_backward(
    context: PassContext, stream: GradientStream, batch: Batch, random: RandomState
) -> Backward:
    """Differentiate the unweighted loss; the gradient is dotted and summed leaf by leaf."""
    losses, weights = single_loss(context, stream.params, batch)
    known = stream.backward(weights.detach()[0], losses.mean())
    micro = weighted_batch(batch, random, losses, weights)
    return Backward(None, micro if known is None else replace(micro, dots=lambda _: known[None]))


def single_loss(
    context: PassContext, params: Params, batch: Batch
) -> tuple[Float[Tensor, "1"], Float[Tensor, "1"]]:
    """Return loss and weight of the only example.

    Raises:
        ValueError: There are several examples.
    """
    problem = context.reweighting
    losses, features = problem.losses(params, batch)
    if len(losses) != 1:
        raise ValueError(
            f"route Dot(): expected micro-batches of 1 example, found {len(losses)}; choose "
            "Ghost() or PerExample(), or pass the examples as so many micro-batches"
        )
    return losses, problem.weights_of(context.upper_params, batch, features, losses)


def single_example(context: PassContext, micro: MicroBatch, grads: Tree) -> MicroBatch:
    """Return what the only example leaves: its gradient is still to be multiplied by its weight."""

    def dots(direction: Tree) -> Float[Tensor, "1"]:
        with torch.no_grad():
            return tree.vdot(grads, direction)[None]

    assert micro.weights is not None
    micro = replace(micro, factor=micro.weights.detach()[0])
    if not context.differentiate:
        return micro
    if context.direction is None:
        return replace(micro, dots=dots)
    known = dots(context.direction)  # at once: the gradient need not be kept
    return replace(micro, dots=lambda _: known)
