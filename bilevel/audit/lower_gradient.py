"""The gradient of the lower loss, by ways that share nothing with what is audited.

``plain_gradient`` is ``torch.autograd.grad`` of the user's own functions. ``slope_error`` needs no
backward pass at all: it compares a gradient with differences of the lower loss, by forward passes
alone, so that neither a part that is recomputed with other values, nor a tap, nor a backward
formula has a part in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bilevel import tree
from bilevel.autodiff import random_state
from bilevel.autodiff.gradient import as_leaves
from bilevel.autodiff.random_state import RandomState
from bilevel.autodiff.stop_gradients import Constant, StopGradients, watched
from bilevel.problem import Batch, Params, Problem, ReweightingProblem, detached
from bilevel.tree import Tree

_STEPS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # of the differences, relative to the norm of θ
_SHORTER = 0.8  # a second difference by which a first one is known to be steady
_DIRECTIONS = 2  # beside the gradient itself


def plain_gradient(
    problem: Problem, lower_params: Params, upper_params: Params, batches: Sequence[Batch]
) -> Tree:
    """Return ∇_θ Σ_m (n_m/N) L_m(θ, φ) by plain autograd; None leaves: no gradient."""
    params = tree.map(lambda leaf: leaf.detach().clone().requires_grad_(), lower_params)
    fixed = tree.map(Tensor.detach, upper_params)
    total: Tree = tree.map(lambda _: None, lower_params)
    count = 0
    for batch in batches:
        with torch.enable_grad():
            loss, size = _loss(problem, params, fixed, batch)
            grads: Sequence[Tensor | None] = [None] * len(tree.leaves(params))
            if loss.requires_grad and grads:
                grads = torch.autograd.grad(loss, tree.leaves(params), allow_unused=True)
        remaining = iter(grads)
        grad = tree.map(lambda _, it=remaining: next(it), params)
        total, count = tree.axpy(float(size), grad, total), count + size
    return tree.map(lambda grad, leaf: (grad / count).to(leaf.dtype), total, lower_params)


def gradient_error(grads: Tree, plain: Tree) -> float:
    """Return ‖grads − plain‖ / ‖plain‖."""
    difference = float(tree.norm(tree.axpy(-1.0, grads, plain)))
    return ratio(difference, float(tree.norm(plain)))


def slope_error(
    problem: Problem,
    lower_params: Params,
    upper_params: Params,
    batches: Sequence[Batch],
    random: RandomState,
    grads: Tree,
) -> float:
    """Return how far a lower gradient g is from the slopes of the lower loss, by forward passes.

    Along d, first g itself and then random directions, ⟨g, d⟩ is compared with::

        (L(θ + ε d) − L(θ − ε d)) / 2ε

    at the ε where the difference is steadiest, by comparison with that at 0.8 ε. What autograd
    takes for a constant stays so (``bilevel.autodiff.stop_gradients``): φ, the random numbers,
    features that are data, what is detached or computed while grad mode is off. A gap that is no
    larger than ten times the unsteadiness is rounding and counts as 0.

    Args:
        problem: The losses.
        lower_params: θ.
        upper_params: φ.
        batches: The micro-batches.
        random: From where they draw.
        grads: g; None leaves are zero.

    Returns:
        The largest relative error among the directions; NaN if the loss cannot be evaluated at
        neighbouring parameters with its constants held.

    Cost: 60 forward passes.
    """
    params = tree.map(lambda leaf: leaf.detach().to(tree.wide_dtype(leaf.dtype)), lower_params)
    fixed = tree.map(Tensor.detach, upper_params)
    held: Sequence[Constant] | None = None

    def value(at: Params) -> float:
        """Return the lower loss; the first call finds the constants, the others hold them."""
        nonlocal held
        leaves = as_leaves(tree.map(lambda leaf, like: leaf.to(like.dtype), at, lower_params))
        watch = StopGradients(held)
        seen = watched(problem, watch)
        total, count = 0.0, 0
        with random_state.rewound_to(random, lower_params), torch.enable_grad():
            for batch in batches:
                loss, size = _loss(seen, leaves, fixed, batch)
                total, count = total + size * float(loss.detach()), count + size
        watch.finish()
        if held is None:
            held = watch.constants
        return total / count

    try:
        return _largest_gap(value, params, grads)
    except RuntimeError:  # of an operation in place, or another path at the neighbours
        return math.nan


def _largest_gap(value: Callable[[Params], float], params: Params, grads: Tree) -> float:
    """Return the largest relative error along the gradient and random directions."""
    epsilon = max((torch.finfo(leaf.dtype).eps for leaf in tree.leaves(grads)), default=0.0)
    rounding = epsilon * abs(value(params))
    size = float(tree.norm(params)) or 1.0
    generator = torch.Generator().manual_seed(0)
    wide = tree.map(lambda leaf: leaf.to(tree.wide_dtype(leaf.dtype)), grads)
    entries = sum(leaf.numel() for leaf in tree.leaves(wide))
    typical = float(tree.norm(wide)) / math.sqrt(max(entries, 1))  # slope in a random direction
    worst = 0.0
    for direction in (wide, *(_random_like(wide, generator) for _ in range(_DIRECTIONS))):
        length = float(tree.norm(direction))
        if length > 0.0:
            unit = tree.scale(1.0 / length, direction)
            slope = float(tree.vdot(wide, unit))
            gaps = [
                _gap(value, params, unit, slope, typical, step * size, rounding) for step in _STEPS
            ]
            unsteady, error = min(gaps)
            worst = max(worst, error if error > 10.0 * unsteady else 0.0)
    return worst


def _gap(
    value: Callable[[Params], float],
    params: Params,
    unit: Tree,
    slope: float,
    typical: float,
    step: float,
    rounding: float,
) -> tuple[float, float]:
    """Return how unsteady a difference is, and how far it is from the slope, both relative."""

    def difference(step: float) -> float:
        ahead, behind = (value(tree.axpy(sign * step, unit, params)) for sign in (1.0, -1.0))
        return (ahead - behind) / (2.0 * step)

    first, second = difference(step), difference(_SHORTER * step)
    whole = max(abs(first), abs(slope), typical)
    unsteady = ratio(abs(first - second) + rounding / step, whole)
    if first == 0.0:  # below the resolution of the loss, which the larger steps may not be
        unsteady = max(unsteady, 1.0)
    return unsteady, ratio(abs(first - slope), whole)


def _loss(
    problem: Problem, params: Params, upper_params: Params, batch: Batch
) -> tuple[Tensor, int]:
    """Return the loss of a micro-batch and its size."""
    if not isinstance(problem, ReweightingProblem):
        loss = problem.lower_loss(params, upper_params, batch)
        size = 1 if problem.batch_size is None else int(problem.batch_size(batch))
        return (loss[0] if isinstance(loss, tuple) else loss), size
    losses, features = problem.per_example_loss(params, batch)
    weights = problem.weights(
        upper_params, batch, detached(features) if problem.detach_features else features
    )
    return (weights * losses).sum() / len(losses), len(losses)


def _random_like(like: Tree, generator: torch.Generator) -> Tree:
    def draw(leaf: Tensor) -> Tensor:
        return torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype).to(leaf.device)

    return tree.map(draw, like)


def ratio(part: float, whole: float) -> float:
    """Return part / whole, 0 for 0/0, and never a comparison-proof NaN."""
    if math.isnan(part) or math.isnan(whole):
        return math.inf
    return part / whole if whole > 0.0 else (0.0 if part == 0.0 else math.inf)
