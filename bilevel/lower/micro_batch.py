"""One micro-batch of the lower level: what its lower pass is given, and what it leaves behind.

Here are the passes that are the same whatever the route. Each takes (context, batch, random) and
returns the gradient of the micro-batch's mean weighted loss (None leaves: no gradient) and a
``MicroBatch``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from bilevel import tree
from bilevel.autodiff.gradient import as_leaves, gradients
from bilevel.autodiff.random_state import RandomState
from bilevel.autodiff.second_derivative import has_second_derivative
from bilevel.lower.guard import LOOKS, Guard
from bilevel.problem import (
    Batch,
    Params,
    Problem,
    ReweightingProblem,
    detached,
    dropped,
    lower_value,
    weighted_mean,
)
from bilevel.tree import Tree


@dataclass(eq=False)
class Fallback:
    """What ``Auto`` took for a micro-batch in place of routes that do not apply to it.

    Attributes:
        reasons: Why not, by route, in the order in which they were tried.
        taken: The route that was taken; None: none was tried in vain.
    """

    reasons: dict[str, str] = field(default_factory=dict)
    taken: str | None = None

    @property
    def note(self) -> str | None:
        """One sentence on what was taken and why; None if the first choice applied."""
        if self.taken is None:
            return None
        return f"Auto() took {self.taken}: {'; '.join(self.reasons.values())}"


class GradientGraph(NamedTuple):
    """∇_θ L with its graph, and the leaves of θ and φ that this ends in."""

    grads: Tree
    lower_params: Params
    upper_params: Params


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What a micro-batch left behind.

    Attributes:
        batch: The micro-batch.
        random: The random state from which it was run.
        size: Examples (1 if the problem does not say).
        loss: Mean weighted loss.
        losses: Per example; None for a ``BilevelProblem``.
        weights: Per example; with a graph to φ if features are detached and φ requires grad.
        dots: μ -> ⟨μ, ∇ℓ_i⟩ / size, per example; None: the product needs another pass.
        aux: What the lower loss returned beside its value, detached.
        factor: What the gradient is still to be multiplied by; None: by nothing.
        fallback: What ``Auto`` took in place of what; products add to it.
        graph: Its gradient with a graph, if that was asked for and products may go through it;
            see ``PassRequest``.
    """

    batch: Batch
    random: RandomState
    size: int
    loss: Float[Tensor, ""]
    losses: Float[Tensor, " batch"] | None = None
    weights: Float[Tensor, " batch"] | None = None
    dots: Callable[[Tree], Float[Tensor, " batch"]] | None = None
    aux: Any = None
    factor: Float[Tensor, ""] | None = None
    fallback: Fallback = field(default_factory=Fallback)
    graph: GradientGraph | None = None

    @property
    def note(self) -> str | None:
        """What a user should know about the route in use; None if it applied."""
        return self.fallback.note

    def summary(self) -> MicroBatch:
        """Return the figures alone, for the record of a step: no batch, no graph, no closure."""
        weights = None if self.weights is None else self.weights.detach()
        return replace(self, batch=None, weights=weights, dots=None, graph=None)


@dataclass(frozen=True, eq=False)
class PassContext:
    """What all micro-batches of a lower pass have in common; see ``lower_pass``."""

    problem: Problem
    lower_params: Params
    upper_params: Params
    differentiate: bool
    direction: Tree | None
    keep_graph: bool = False
    guard: Guard = LOOKS

    @property
    def reweighting(self) -> ReweightingProblem[Any, Any, Any]:
        """The problem, where it is known to have per-example losses."""
        assert isinstance(self.problem, ReweightingProblem)
        return self.problem


class Backward(NamedTuple):
    """A lower pass of one micro-batch.

    Attributes:
        grads: Its gradient, but for ``MicroBatch.factor``; None: already added to the sum.
        micro: What it left behind.
        kept: Whether the products with μ hold the gradient anyway.
    """

    grads: Tree | None
    micro: MicroBatch
    kept: bool = False


class LossTerms(NamedTuple):
    """The lower loss on a micro-batch, and what it is made of.

    Attributes:
        loss: The mean weighted loss.
        losses: Per example; None for a ``BilevelProblem``.
        weights: Per example, likewise.
        aux: What the lower loss returned beside its value.
        size: Examples (1 if the problem does not say).
    """

    loss: Float[Tensor, ""]
    losses: Float[Tensor, " batch"] | None
    weights: Float[Tensor, " batch"] | None
    aux: Any
    size: int


def loss_terms(
    problem: Problem, lower_params: Params, upper_params: Params, batch: Batch
) -> LossTerms:
    """Return the lower loss with its graphs to both parameters.

    Raises:
        ValueError: Loss, losses or weights of a wrong shape.
    """
    if isinstance(problem, ReweightingProblem):
        losses, features = problem.losses(lower_params, batch)
        weights = problem.weights_of(upper_params, batch, features, losses)
        return LossTerms(weighted_mean(weights, losses), losses, weights, None, len(losses))
    loss, aux = lower_value(problem, lower_params, upper_params, batch)
    size = 1 if problem.batch_size is None else problem.batch_size(batch)
    return LossTerms(loss, None, None, aux, size)


def scalar_backward(context: PassContext, batch: Batch, random: RandomState) -> Backward:
    """Differentiate the scalar loss of a ``BilevelProblem``."""
    params, upper_params = as_leaves(context.lower_params), _upper_leaves(context)
    loss, _, _, aux, size = loss_terms(context.problem, params, upper_params, batch)
    grads, graph = _differentiated(context, loss, params, upper_params)
    micro = MicroBatch(batch, random, size, loss.detach(), aux=detached(aux), graph=graph)
    return Backward(grads, micro)


def attached_backward(context: PassContext, batch: Batch, random: RandomState) -> Backward:
    """Differentiate a loss whose weights depend on θ through the features."""
    params, upper_params = as_leaves(context.lower_params), _upper_leaves(context)
    terms = loss_terms(context.reweighting, params, upper_params, batch)
    assert terms.losses is not None
    assert terms.weights is not None
    grads, graph = _differentiated(context, terms.loss, params, upper_params)
    plain = terms.loss.detach(), terms.losses.detach(), terms.weights.detach()
    return Backward(grads, MicroBatch(batch, random, terms.size, *plain, graph=graph))


def detached_backward(context: PassContext, batch: Batch, random: RandomState) -> Backward:
    """Differentiate the weighted loss as autograd has it; products are left to another pass."""
    problem, params = context.reweighting, as_leaves(context.lower_params)
    losses, features = problem.losses(params, batch)
    weights = problem.weights_of(context.upper_params, batch, features, losses)
    micro = weighted_batch(batch, random, losses, weights)
    if not context.keep_graph:
        weights = weights.detach()
    loss = weighted_mean(weights, losses)
    grads, graph = _differentiated(context, loss, params, context.upper_params)
    return Backward(grads, micro if graph is None else replace(micro, graph=graph))


def _upper_leaves(context: PassContext) -> Params:
    """Return φ as the loss of a pass gets it, with a graph only if that is kept."""
    if context.keep_graph:
        return as_leaves(context.upper_params)
    return tree.map(Tensor.detach, context.upper_params)


def _differentiated(
    context: PassContext,
    loss: Float[Tensor, ""],
    lower_params: Params,
    upper_params: Params,
) -> tuple[Tree, GradientGraph | None]:
    """Return the gradient of a loss, and its graph if that is kept."""
    kept = context.keep_graph and has_second_derivative(loss, tree.leaves(lower_params))
    if not kept:
        return gradients([loss], lower_params), None
    grads = gradients([loss], lower_params, create_graph=True)
    graph = GradientGraph(grads, lower_params, upper_params)
    return tree.map(Tensor.detach, grads), graph


def weighted_batch(
    batch: Batch,
    random: RandomState,
    losses: Float[Tensor, " batch"],
    weights: Float[Tensor, " batch"],
) -> MicroBatch:
    """Return what is left of a micro-batch with these losses and weights."""
    losses, plain = losses.detach(), weights.detach()
    loss = weighted_mean(plain, losses.masked_fill(dropped(plain, losses), 0.0))
    return MicroBatch(batch, random, len(losses), loss, losses, weights)
