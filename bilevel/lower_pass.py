"""Forward and backward pass of the lower loss over the micro-batches of a step.

Whatever the route, the gradient is that of Σ_m (n_m/N) · lower_loss(batch_m), n_m being the
examples of micro-batch m and N all of them, so that micro-batches make up one batch exactly. A
route computes its gradient in the same way whether or not an upper update follows; with weights
that are all exactly 1 it does so by autograd's own kernels, which is plain training bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import optree
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from bilevel import random_state, tree
from bilevel.ghost.context import Context
from bilevel.ghost.operations import OPERATIONS
from bilevel.ghost.tracker import Refusal, Tracker
from bilevel.gradient import as_leaves, gradients
from bilevel.problem import Batch, Params, Problem, ReweightingProblem
from bilevel.random_state import RandomState
from bilevel.routes import Auto, Dot, Ghost, PerExample, Route
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
    """

    batch: Batch
    random: RandomState
    size: int
    loss: Tensor
    losses: Tensor | None = None
    weights: Tensor | None = None
    dots: Callable[[Tree], Tensor] | None = None
    note: str | None = None


@dataclass(frozen=True, eq=False)
class LowerPass:
    """Gradient of the step (None leaves: no gradient) and its micro-batches."""

    grads: Tree
    micro_batches: list[MicroBatch]

    @property
    def shares(self) -> list[float]:
        """Each micro-batch's share n_m / N of the examples."""
        total = sum(micro.size for micro in self.micro_batches)
        return [micro.size / total for micro in self.micro_batches]


@dataclass(frozen=True, eq=False)
class _Run:
    """What all micro-batches of a pass have in common; see `lower_pass`."""

    problem: Problem
    route: Route
    lower_params: Params
    upper_params: Params
    differentiate: bool
    direction: Tree | None


def lower_pass(
    problem: Problem,
    route: Route,
    lower_params: Params,
    upper_params: Params,
    batches: Sequence[Batch],
    *,
    differentiate: bool = False,
    direction: Tree | None = None,
) -> LowerPass:
    """Run all micro-batches.

    Args:
        problem: The losses.
        route: How the mixed product will be computed.
        lower_params: θ; not changed.
        upper_params: φ, requiring grad if a mixed product will be asked for.
        batches: The micro-batches.
        differentiate: Whether a mixed product will be asked for.
        direction: μ, if it is known already.

    Raises:
        Refusal: The route is `Ghost` or `PerExample`, and a parameter is used in a way that has
            no per-example rule.
        ValueError: The route is `Dot` and a micro-batch has several examples.
    """
    run = _Run(problem, route, lower_params, upper_params, differentiate, direction)
    runner = _runner(problem, route)
    micro_batches: list[MicroBatch] = []
    total: Tree = None
    for batch in batches:
        random = random_state.capture(lower_params)
        with torch.enable_grad():
            grads, micro = runner(run, batch, random)
        micro_batches.append(micro)
        with torch.no_grad():
            relative = micro.size / micro_batches[0].size
            total = grads if len(micro_batches) == 1 else tree.axpy(relative, grads, total)
    if len(batches) > 1:
        with torch.no_grad():
            relative = sum(micro.size for micro in micro_batches) / micro_batches[0].size
            total = tree.map(lambda leaf: leaf / relative, total)
    return LowerPass(total, micro_batches)


def _runner(
    problem: Problem, route: Route
) -> Callable[[_Run, Batch, RandomState], tuple[Tree, MicroBatch]]:
    if not isinstance(problem, ReweightingProblem):
        return _run_scalar
    if not problem.detach_features:
        return _run_attached
    if isinstance(route, Dot):
        return _run_single
    if isinstance(route, Auto | Ghost | PerExample):
        return _run_tapped
    return _run_detached


def _run_scalar(run: _Run, batch: Batch, random: RandomState) -> tuple[Tree, MicroBatch]:
    """A `BilevelProblem`: one scalar loss."""
    params = as_leaves(run.lower_params)
    loss = run.problem.lower_loss(params, tree.map(Tensor.detach, run.upper_params), batch)
    batch_size = getattr(run.problem, "batch_size", None)
    size = 1 if batch_size is None else batch_size(batch)
    return gradients([loss], params), MicroBatch(batch, random, size, loss.detach())


def _run_attached(run: _Run, batch: Batch, random: RandomState) -> tuple[Tree, MicroBatch]:
    """Weights that depend on θ through the features."""
    assert isinstance(run.problem, ReweightingProblem)
    params = as_leaves(run.lower_params)
    losses, features = run.problem.losses(params, batch)
    upper_params = tree.map(Tensor.detach, run.upper_params)
    weights = run.problem.weights_of(upper_params, batch, features, losses)
    loss = (weights * losses).mean()
    grads = gradients([loss], params)
    micro = MicroBatch(batch, random, len(losses), loss.detach(), losses.detach(), weights.detach())
    return grads, micro


def _run_detached(run: _Run, batch: Batch, random: RandomState) -> tuple[Tree, MicroBatch]:
    """An ordinary backward pass of the weighted loss; the product is left to another pass."""
    assert isinstance(run.problem, ReweightingProblem)
    params = as_leaves(run.lower_params)
    losses, features = run.problem.losses(params, batch)
    weights = run.problem.weights_of(run.upper_params, batch, features, losses)
    loss = (weights.detach() * losses).mean()
    return gradients([loss], params), _weighted(batch, random, losses, weights)


def _run_single(run: _Run, batch: Batch, random: RandomState) -> tuple[Tree, MicroBatch]:
    """One example: its unweighted gradient, kept or dotted, then scaled."""
    assert isinstance(run.problem, ReweightingProblem)
    params = as_leaves(run.lower_params)
    losses, features = run.problem.losses(params, batch)
    if len(losses) != 1:
        raise ValueError(
            f"route Dot(): expected micro-batches of 1 example, found {len(losses)}; choose "
            "Ghost() or PerExample(), or pass the examples as so many micro-batches"
        )
    weights = run.problem.weights_of(run.upper_params, batch, features, losses)
    return _scaled(run, batch, random, losses, weights, gradients([losses.mean()], params))


def _run_tapped(run: _Run, batch: Batch, random: RandomState) -> tuple[Tree, MicroBatch]:
    """Several examples: gradient weighted per example and products from one backward pass."""
    problem, auto = run.problem, isinstance(run.route, Auto)
    assert isinstance(problem, ReweightingProblem)
    keeping = run.route if isinstance(run.route, PerExample) else PerExample()
    context = Context(keeping.entries_limit)
    tracker = Tracker(OPERATIONS, run.lower_params, batch, context)
    with tracker:
        losses, features = problem.losses(tracker.visible, batch)
    weights = problem.weights_of(run.upper_params, batch, features, losses)
    owners = {} if problem.rows is None else problem.rows(batch)
    size = len(losses)
    note = None if size == 1 else tracker.refusal(size, owners)
    if note is not None and not auto:
        raise Refusal(f"route {type(run.route).__name__}(): {note}")
    if size == 1 or note is not None:
        loss = losses.mean() if size == 1 else (weights.detach() * losses).mean()
        escaped, grads = gradients([loss], (tracker.visible, tracker.collectors))
        grads = tree.add(escaped, grads)
        if size == 1:
            return _scaled(run, batch, random, losses, weights, grads)
        return grads, _weighted(batch, random, losses, weights, note=note)
    known = None if run.direction is None else _by_name(run.lower_params, run.direction)
    keep = run.differentiate and known is None
    context.weight(weights.detach(), owners, known, keep)
    try:
        escaped, grads = gradients([losses.mean()], (tracker.visible, tracker.collectors))
        if tree.leaves(escaped):
            note = (
                f"parameters {list(tree.flatten(escaped))} got a gradient past every torch "
                "operation (a custom autograd.Function or a compiled module?)"
            )
    except CheckpointError:
        note = "activation checkpointing runs parts of the model again, without their taps"
    if note is not None and not auto:
        raise Refusal(f"route {type(run.route).__name__}(): {note}; choose the route Jvp()")
    if note is not None:
        with random_state.replay(random, run.lower_params):
            grads, micro = _run_detached(run, batch, random)
        return grads, replace(micro, note=note)

    def dots(direction: Tree) -> Tensor:
        if keep:
            return context.later_dots(_by_name(run.lower_params, direction))
        assert context.dots is not None
        return context.dots

    return grads, _weighted(batch, random, losses, weights, dots)


def _scaled(
    run: _Run, batch: Batch, random: RandomState, losses: Tensor, weights: Tensor, grads: Tree
) -> tuple[Tree, MicroBatch]:
    """Turn the gradient of the only example into that of its weighted loss."""
    with torch.no_grad():
        weight = weights.detach()[0]
        weighted = tree.map(lambda leaf: leaf * weight.to(leaf.dtype), grads)
        if not run.differentiate:
            return weighted, _weighted(batch, random, losses, weights)
        if run.direction is None:
            return weighted, _weighted(
                batch, random, losses, weights, lambda direction: tree.vdot(grads, direction)[None]
            )
        known = tree.vdot(grads, run.direction)[None]
        return weighted, _weighted(batch, random, losses, weights, lambda _: known)


def _weighted(
    batch: Batch,
    random: RandomState,
    losses: Tensor,
    weights: Tensor,
    dots: Callable[[Tree], Tensor] | None = None,
    note: str | None = None,
) -> MicroBatch:
    losses = losses.detach()
    loss = (weights.detach() * losses).mean()
    return MicroBatch(batch, random, len(losses), loss, losses, weights, dots, note)


def _by_name(params: Params, direction: Tree) -> Mapping[str, Tensor]:
    """Return the directions that are not None, by the path of their parameter."""
    names = tree.names(params)
    structure = optree.tree_structure(params)
    found = structure.flatten_up_to(direction)
    return {name: leaf for name, leaf in zip(names, found, strict=True) if leaf is not None}
