"""A point at which hypergradients of the real objective are compared, and a plain loop for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import AdamW, tree
from recipes.method.objective import Objective
from tests.bilevel.run_window import run_step


@dataclass(frozen=True)
class Setup:
    objective: Objective
    optimizer: AdamW
    lower: dict[str, Tensor]
    state: Any
    upper: dict[str, Tensor]
    batch: dict[str, Tensor]
    meta: dict[str, Tensor]


def double(batch):
    return {
        name: value.double() if value.is_floating_point() else value
        for name, value in batch.items()
    }


def by_route(setup, one_step):
    result = run_step(
        one_step,
        setup.objective.problem(),
        setup.optimizer,
        setup.lower,
        setup.upper,
        setup.state,
        [setup.batch],
        setup.meta,
    )
    return result.hypergradient


def by_loop(setup, order):
    """Σ_i ∂w_i/∂φ ⟨μ, ∇ℓ_i⟩ / batch with each ∇ℓ_i from a backward pass of its own."""
    leaves = tree.map(lambda leaf: leaf.detach().requires_grad_(), setup.lower)
    names = list(leaves)
    problem = setup.objective.problem()
    losses, features = problem.losses(leaves, setup.batch)
    each = [
        torch.autograd.grad(loss, leaves.values(), retain_graph=True, materialize_grads=True)
        for loss in losses
    ]
    upper = tree.map(lambda leaf: leaf.detach().requires_grad_(), setup.upper)
    weights = problem.weights_of(upper, setup.batch, features, losses)
    grads = {
        name: sum(w * g[place] for w, g in zip(weights.detach(), each, strict=True)) / len(each)
        for place, name in enumerate(names)
    }
    at = setup.lower
    if order == "lower-first":
        with torch.no_grad():
            at, _ = setup.optimizer.update(grads, setup.state, setup.lower)
    ahead = tree.map(lambda leaf: leaf.detach().requires_grad_(), at)
    loss, _ = problem.upper_loss(ahead, setup.upper, setup.meta)
    found = torch.autograd.grad(loss, ahead.values(), materialize_grads=True)
    v = dict(zip(names, found, strict=True))
    with torch.no_grad():
        if order == "lower-first":
            mu = setup.optimizer.grads_vjp(grads, setup.state, setup.lower, v)
        else:
            mu = setup.optimizer.predicted_grads_vjp(setup.state, setup.lower, v)
        dots = torch.stack(
            [sum((mu[name] * g[place]).sum() for place, name in enumerate(names)) for g in each]
        )
    grads_of_weights = torch.autograd.grad(weights, upper.values(), dots / len(each))
    return dict(zip(upper, grads_of_weights, strict=True))


def distance(found, expected):
    return float(tree.norm(tree.axpy(-1.0, expected, found)) / tree.norm(expected))
