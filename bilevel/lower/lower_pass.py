"""Forward and backward pass of the lower loss over the micro-batches of a step.

Whatever the route, the gradient is that of Σ_m (n_m/N) · lower_loss(batch_m), n_m being the
examples of micro-batch m and N all of them, so that micro-batches make up one batch exactly. A
route computes its gradient in the same way whether or not an upper update follows; with weights
that are all exactly 1 it does so by autograd's own kernels, which is plain training bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import tree
from bilevel.autodiff import random_state
from bilevel.collective import ALONE, Alone, Collective
from bilevel.lower.gradient_sum import GradientSum
from bilevel.lower.guard import LOOKS, Guard
from bilevel.lower.micro_batch import (
    MicroBatch,
    PassContext,
    attached_backward,
    scalar_backward,
)
from bilevel.lower.route import BackwardPass, Route
from bilevel.problem import Batch, Params, Problem, ReweightingProblem, is_separable
from bilevel.profiling import part
from bilevel.tree import Tree


@dataclass(frozen=True, eq=False)
class LowerPass:
    """Gradient of the step (None leaves: no gradient), its micro-batches, and remarks.

    The gradient is that of all ranks, the micro-batches are those of this one.
    """

    grads: Tree
    micro_batches: list[MicroBatch]
    norm: Float[Tensor, ""] | None = None
    remarks: tuple[str, ...] = ()  # on what has no effect
    collective: Collective = Alone()
    examples: int | None = None  # of all ranks; None: those of the micro-batches
    direction: Tree | None = None  # μ that was known before, if products need it still

    @cached_property
    def grad_norm(self) -> Float[Tensor, ""]:
        """Norm of the gradient, scalar; also of a summary, which has no gradient any more."""
        return tree.norm(self.grads) if self.norm is None else self.norm

    def summary(self) -> LowerPass:
        """Return the figures alone: no gradients, no batches, no graphs; a few numbers."""
        micro_batches = [micro.summary() for micro in self.micro_batches]
        norm = self.grad_norm.detach()
        return replace(self, grads=None, micro_batches=micro_batches, norm=norm, direction=None)

    def figures(self) -> PassFigures:
        """Return loss, losses and weights of the micro-batches of all ranks, without graphs."""
        micro_batches = self.micro_batches
        if self.collective.ranks == 1 and len(micro_batches) == 1:
            (micro,) = micro_batches
            loss = micro.loss.detach()
            return PassFigures(loss, _joined([micro.losses]), _joined([micro.weights]))
        with torch.no_grad():
            return self._gathered_figures()

    def _gathered_figures(self) -> PassFigures:
        """Return the figures of several micro-batches, or of those of all ranks."""
        micro_batches = self.micro_batches
        terms = [
            micro.loss * share for micro, share in zip(micro_batches, self.shares, strict=True)
        ]
        columns = [
            _joined([micro.losses for micro in micro_batches]),
            _joined([micro.weights for micro in micro_batches]),
        ]
        if self.collective.ranks == 1:
            return PassFigures(torch.stack(terms).sum(), *columns)
        device = self.grad_norm.device
        loss = torch.stack(terms).sum() if terms else torch.zeros((), device=device)
        # One message: the loss, and behind it as many losses as weights.
        pieces = [loss[None], *(column for column in columns if column is not None)]
        dtype = reduce(torch.promote_types, (piece.dtype for piece in pieces))
        parts = self.collective.gathered(torch.cat([piece.to(dtype) for piece in pieces]))
        halves = [part[1:].reshape(2, -1) for part in parts]
        total = torch.stack([part[0] for part in parts]).sum()
        losses, weights = torch.cat(halves, dim=1)
        return PassFigures(total, *((losses, weights) if len(losses) else (None, None)))

    def loss_and_weights(self) -> tuple[Tensor, Tensor | None]:
        """Return what ``Guard.lower`` asks for."""
        figures = self.figures()
        return figures.loss, figures.weights

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about the routes in use, each note once."""
        notes = (micro.note for micro in self.micro_batches)
        return tuple(dict.fromkeys(note for note in notes if note is not None))

    @property
    def shares(self) -> list[float]:
        """Each micro-batch's share n_m / N of the examples of all ranks."""
        total = self.examples or sum(micro.size for micro in self.micro_batches)
        return [micro.size / total for micro in self.micro_batches]


class PassFigures(NamedTuple):
    """Weighted mean loss of a pass; losses and weights, micro-batches put end to end, or None."""

    loss: Float[Tensor, ""]
    losses: Float[Tensor, " batch"] | None
    weights: Float[Tensor, " batch"] | None


def _joined(pieces: Sequence[Float[Tensor, " _"] | None]) -> Float[Tensor, " batch"] | None:
    present = [piece.detach() for piece in pieces if piece is not None]
    if len(present) == 1:
        return present[0]
    return torch.cat(present) if present else None


@part("lower pass")
def lower_pass(
    problem: Problem,
    route: Route,
    lower_params: Params,
    upper_params: Params,
    batches: Sequence[Batch],
    *,
    differentiate: bool = False,
    direction: Tree | None = None,
    keep_graph: bool = False,
    collective: Collective = ALONE,
    guard: Guard = LOOKS,
) -> LowerPass:
    """Run all micro-batches, and sum their gradients over the ranks.

    Args:
        problem: The losses.
        route: How the mixed product will be computed.
        lower_params: θ; not changed.
        upper_params: φ, requiring grad if a mixed product will be asked for.
        batches: The micro-batches.
        differentiate: Whether a mixed product will be asked for.
        direction: μ, if it is known already.
        keep_graph: Whether a plain backward pass keeps its graph; see ``PassRequest``.
        collective: The ranks that the micro-batches of the step are spread over.
        guard: Who decides what depends on values.

    Raises:
        Refusal: The route is ``Ghost`` or ``PerExample``, and a parameter is used in a way that has
            no per-example rule.
        ValueError: The route is ``Dot`` and a micro-batch has several examples.
    """
    context = PassContext(
        problem, lower_params, upper_params, differentiate, direction, keep_graph, guard
    )
    total = GradientSum(lower_params, widen=len(batches) > 1)
    backward = _backward_pass(context, route, total)
    micro_batches: list[MicroBatch] = []
    for batch in batches:
        random = random_state.capture(lower_params)
        with torch.enable_grad():
            grads, micro, kept = backward(batch, random)
        if not micro.size:  # contributes nothing
            continue
        micro_batches.append(micro)
        if grads is None:  # added as it came; one example in each, so all have the same share
            continue
        if len(batches) == 1 and micro.factor is None:
            return _over_ranks(context, collective, grads, micro_batches, 1)
        relative = micro.size / micro_batches[0].size
        factor = relative if micro.factor is None else micro.factor * relative
        total.add(factor, grads, kept=kept)
        del grads
    grads = None
    if micro_batches:
        grads = total.mean(sum(micro.size for micro in micro_batches) / micro_batches[0].size)
    return _over_ranks(context, collective, grads, micro_batches, len(batches))


def _over_ranks(
    context: PassContext,
    collective: Collective,
    grads: Tree,
    micro_batches: list[MicroBatch],
    count: int,
) -> LowerPass:
    """Return the pass with the gradient of all ranks.

    Raises:
        ValueError: No rank has an example.
    """
    here = sum(micro.size for micro in micro_batches)
    grads, examples = collective.mean("lower gradient", grads, here, context.lower_params)
    if not examples:
        raise ValueError(
            f"lower_batches: expected at least 1 example in the {count} micro-batches of a step, "
            "found 0"
        )
    of_ranks = examples if collective.ranks > 1 else None
    done = all(micro.dots is not None for micro in micro_batches)
    direction = None if done else context.direction
    passed = LowerPass(grads, micro_batches, None, (), collective, of_ranks, direction)
    return remarked(context, passed)


def remarked(context: PassContext, passed: LowerPass) -> LowerPass:
    """Return the pass with remarks on what has no effect."""
    remarks = [*unused_parameters(context.lower_params, passed.grads)]
    weights = [micro.weights for micro in passed.micro_batches if micro.weights is not None]
    if are_constant(context.problem, weights, context.upper_params):
        remarks.append(_CONSTANT_WEIGHTS)
    return replace(passed, remarks=tuple(remarks)) if remarks else passed


def are_constant(problem: Problem, weights: Sequence[Tensor], upper_params: Params) -> bool:
    """Return whether weights that are a function of φ alone have no graph to a φ that moves."""
    if not is_separable(problem) or not weights:
        return False
    moves = any(leaf.requires_grad for leaf in tree.leaves(upper_params))
    return moves and not any(weight.requires_grad for weight in weights)


def unused_parameters(lower_params: Params, grads: Tree) -> tuple[str, ...]:
    """Return a remark if the lower loss, with these gradients, does not depend on all of θ."""
    missing, count = tree.missing(grads, lower_params), len(tree.leaves(lower_params))
    if not missing:
        return ()
    if len(missing) == count:
        return (_IGNORES_PARAMETERS,)
    return (_IGNORES_SOME.format(len(missing), count, missing[0]),)


_IGNORES_SOME = (
    "the lower loss does not depend on {} of the {} lower parameters ({!r}, ...), which stay as "
    "they are: not used, detached, or computed under no_grad (as in reentrant activation "
    "checkpointing of a part whose input needs no gradient: use_reentrant=False)"
)
_IGNORES_PARAMETERS = (
    "the lower loss does not depend on the lower parameters, which stay as they are: let it use "
    "those that it is given, not a module's own (call the module by bilevel.functional(module))"
)
_CONSTANT_WEIGHTS = (
    "the weights do not depend on the upper parameters: they were computed without a graph to "
    "these (no_grad, detach, other tensors)"
)


def _backward_pass(context: PassContext, route: Route, total: GradientSum) -> BackwardPass:
    if is_separable(context.problem):
        return route.backward_pass(context, total)
    if isinstance(context.problem, ReweightingProblem):
        return partial(attached_backward, context)
    return partial(scalar_backward, context)
