"""The whole iteration against double backward through TorchOpt's own update: a second way."""

from __future__ import annotations

import optree
import pytest
import torch
import torchopt

from bilevel import (
    SGD,
    BilevelSolver,
    Ghost,
    Jvp,
    OneStep,
    PerExample,
)
from tests.bilevel.torchopt_reference import OPTIMIZERS, data, problem

WARM_STEPS = 3


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("route", [PerExample(), Jvp()], ids=["per-example", "jvp"])
def test_hypergradient_equals_double_backward_through_torchopt(name, route):
    ours, theirs = OPTIMIZERS[name]
    theta, phi, train, meta = data()
    setup = problem()
    solver = BilevelSolver(setup, ours, SGD(1.0), OneStep(route))
    state = solver.init(theta, phi)
    for _ in range(WARM_STEPS):
        state, _ = solver.step(state, [train])
    after, _ = solver.step(state, [train], meta)
    found = state.upper_params["raw"] - after.upper_params["raw"]

    transformation = theirs()
    params = {key: value.clone() for key, value in theta.items()}
    # TorchOpt computes Adam's bias correction in the dtype of its counts, float32 for integers.
    moments = optree.tree_map(
        lambda leaf: leaf if leaf.is_floating_point() else leaf.double(),
        transformation.init(params),
    )
    raw = phi["raw"].clone().requires_grad_()
    for step in range(WARM_STEPS + 1):
        last = step == WARM_STEPS
        leaves = {key: value.detach().requires_grad_() for key, value in params.items()}
        loss = setup.lower_loss(leaves, {"raw": raw if last else raw.detach()}, train)
        grads = dict(
            zip(leaves, torch.autograd.grad(loss, list(leaves.values()), create_graph=last),
                strict=True)
        )  # fmt: skip
        updates, moments = transformation.update(grads, moments, params=leaves, inplace=False)
        params = torchopt.apply_updates(leaves, updates, inplace=False)
    (expected,) = torch.autograd.grad(setup.upper_loss(params, None, meta), raw)
    assert (found - expected).norm() / expected.norm() < 1e-10
    for key in params:
        torch.testing.assert_close(
            after.lower_params[key], params[key].detach(), rtol=1e-12, atol=1e-15
        )


def test_ghost_agrees_with_it_for_sgd():
    """With SGD the order does not enter μ; only v is taken before the step."""
    theta, phi, train, meta = data()
    setup = problem()
    raw = phi["raw"].clone().requires_grad_()
    leaves = {key: value.clone().requires_grad_() for key, value in theta.items()}
    v = torch.autograd.grad(setup.upper_loss(leaves, None, meta), list(leaves.values()))
    g = torch.autograd.grad(
        setup.lower_loss(leaves, {"raw": raw}, train), list(leaves.values()), create_graph=True
    )
    dot = sum((a * b).sum() for a, b in zip(v, g, strict=True))
    (expected,) = torch.autograd.grad(-0.1 * dot, raw)
    solver = BilevelSolver(setup, SGD(0.1), SGD(1.0), OneStep(Ghost(), "upper-first"))
    after, _ = solver.step(solver.init(theta, phi), [train], meta)
    torch.testing.assert_close(
        phi["raw"] - after.upper_params["raw"], expected, rtol=1e-10, atol=1e-16
    )
