"""One micro-batch of the lower level: forward pass, weighted gradient, what is left behind.

Each function here, and `tapped.run_tapped`, takes (run, batch, random) and returns the gradient of
the micro-batch's mean weighted loss (None leaves: no gradient), but for a factor, and a
`MicroBatch`. They differ in how the gradient is weighted and in what they can say about ⟨μ, ∇ℓ_i⟩.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.autodiff.gradient import as_leaves, gradients
from bilevel.autodiff.random_state import RandomState
from bilevel.lower.gradient_sum import GradientStream
from bilevel.problem import (
    Batch,
    Params,
    Problem,
    ReweightingProblem,
    detached,
    lower_value,
    weighted_mean,
)
from bilevel.routes import Route
from bilevel.tree import Tree


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What a micro-batch left behind.

    Attributes:
        batch: The micro-batch.
        random: From where to replay it.
        size: Examples (1 if the problem does not say).
        loss: Mean weighted loss, scalar.
        losses: Per example [size]; None for a `BilevelProblem`.
        weights: [size]; with a graph to φ if features are detached and φ requires grad.
        dots: μ -> ⟨μ, ∇ℓ_i⟩ / size, [size]; None: the product needs another pass.
        note: Why the route in use did not apply; None if it did.
        aux: What the lower loss returned beside its value, detached.
        factor: What the gradient is still to be multiplied by, scalar; None: by nothing.
    """

    batch: Batch
    random: RandomState
    size: int
    loss: Tensor
    losses: Tensor | None = None
    weights: Tensor | None = None
    dots: Callable[[Tree], Tensor] | None = None
    note: str | None = None
    aux: Any = None
    factor: Tensor | None = None

    def summary(self) -> MicroBatch:
        """Return the figures alone, for the record of a step: no batch, no graph, no closure."""
        weights = None if self.weights is None else self.weights.detach()
        return replace(self, batch=None, weights=weights, dots=None)


@dataclass(frozen=True, eq=False)
class Run:
    """What all micro-batches of a pass have in common; see `lower_pass`."""

    problem: Problem
    route: Route
    lower_params: Params
    upper_params: Params
    differentiate: bool
    direction: Tree | None


def run_scalar(run: Run, batch: Batch, random: RandomState) -> tuple[Tree, MicroBatch]:
    """A `BilevelProblem`: one scalar loss."""
    params = as_leaves(run.lower_params)
    upper_params = tree.map(Tensor.detach, run.upper_params)
    loss, aux = lower_value(run.problem, params, upper_params, batch)
    batch_size = getattr(run.problem, "batch_size", None)
    size = 1 if batch_size is None else batch_size(batch)
    micro = MicroBatch(batch, random, size, loss.detach(), aux=detached(aux))
    return gradients([loss], params), micro


def run_attached(run: Run, batch: Batch, random: RandomState) -> tuple[Tree, MicroBatch]:
    """Weights that depend on θ through the features."""
    assert isinstance(run.problem, ReweightingProblem)
    params = as_leaves(run.lower_params)
    losses, features = run.problem.losses(params, batch)
    upper_params = tree.map(Tensor.detach, run.upper_params)
    weights = run.problem.weights_of(upper_params, batch, features, losses)
    loss = weighted_mean(weights, losses)
    grads = gradients([loss], params)
    micro = MicroBatch(batch, random, len(losses), loss.detach(), losses.detach(), weights.detach())
    return grads, micro


def run_detached(run: Run, batch: Batch, random: RandomState) -> tuple[Tree, MicroBatch]:
    """An ordinary backward pass of the weighted loss; the product is left to another pass."""
    assert isinstance(run.problem, ReweightingProblem)
    params = as_leaves(run.lower_params)
    losses, features = run.problem.losses(params, batch)
    weights = run.problem.weights_of(run.upper_params, batch, features, losses)
    loss = weighted_mean(weights.detach(), losses)
    return gradients([loss], params), weighted_batch(batch, random, losses, weights)


def run_single(run: Run, batch: Batch, random: RandomState) -> tuple[Tree, MicroBatch]:
    """One example: its unweighted gradient, kept for the products, still to be scaled."""
    params = as_leaves(run.lower_params)
    losses, weights = _single_loss(run, params, batch)
    grads = gradients([losses.mean()], params)
    return grads, single(run, batch, random, losses, weights, grads)


def run_streamed(run: Run, batch: Batch, random: RandomState, stream: GradientStream) -> MicroBatch:
    """As `run_single`, where the gradient need not be kept: dotted and summed by `stream`."""
    losses, weights = _single_loss(run, stream.params, batch)
    known = stream.backward(weights.detach()[0], losses.mean())
    micro = weighted_batch(batch, random, losses, weights)
    return micro if known is None else replace(micro, dots=lambda _: known[None])


def _single_loss(run: Run, params: Params, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return loss and weight of the only example, [1] each."""
    assert isinstance(run.problem, ReweightingProblem)
    losses, features = run.problem.losses(params, batch)
    if len(losses) != 1:
        raise ValueError(
            f"route Dot(): expected micro-batches of 1 example, found {len(losses)}; choose "
            "Ghost() or PerExample(), or pass the examples as so many micro-batches"
        )
    return losses, run.problem.weights_of(run.upper_params, batch, features, losses)


def single(
    run: Run, batch: Batch, random: RandomState, losses: Tensor, weights: Tensor, grads: Tree
) -> MicroBatch:
    """Return what the only example leaves, its gradient still to be multiplied by its weight."""

    def dots(direction: Tree) -> Tensor:
        with torch.no_grad():
            return tree.vdot(grads, direction)[None]

    micro = replace(weighted_batch(batch, random, losses, weights), factor=weights.detach()[0])
    if not run.differentiate:
        return micro
    if run.direction is None:
        return replace(micro, dots=dots)
    known = dots(run.direction)  # at once: the gradient need not be kept
    return replace(micro, dots=lambda _: known)


def weighted_batch(
    batch: Batch,
    random: RandomState,
    losses: Tensor,
    weights: Tensor,
    dots: Callable[[Tree], Tensor] | None = None,
    note: str | None = None,
) -> MicroBatch:
    """Return what is left of a micro-batch of so many losses and weights."""
    losses = losses.detach()
    loss = weighted_mean(weights.detach(), losses)
    return MicroBatch(batch, random, len(losses), loss, losses, weights, dots, note)
