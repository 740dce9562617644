"""Every kind of model that is supported: a bilevel step on it, against loops and plain training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bilevel import (
    AdamW,
    Auto,
    BilevelSolver,
    CentralDifference,
    Ghost,
    Jvp,
    OneStep,
    PerExample,
    tree,
)
from prm.inputs.image_inputs import row_owners
from tests.invariants.setting import (
    by_loop,
    by_route,
    distance,
)
from tests.prm.tiny import (
    FORWARD_MODE,
)


@FORWARD_MODE
@pytest.mark.parametrize("order", ["upper-first", "lower-first"])
def test_routes_equal_a_loop_over_examples(setup, order):
    expected = by_loop(setup, order)
    assert float(tree.norm(expected)) > 1e-8
    exact = Ghost() if order == "upper-first" else PerExample()
    for route in (exact, Auto(), Jvp()):
        assert distance(by_route(setup, OneStep(route, order)), expected) < 1e-9, route
    far, near = (
        distance(by_route(setup, OneStep(CentralDifference(step), order)), expected)
        for step in (1e-4, 1e-5)
    )
    assert near < 1e-4
    assert far / near == pytest.approx(100, rel=0.05)  # the error is of second order in the step


def test_weights_of_one_are_plain_training(setup):
    ones = tree.map(torch.zeros_like, setup.upper)  # the table holds deviations from 1
    problem = setup.objective.problem()
    solver = BilevelSolver(problem, setup.optimizer, AdamW(0.1), OneStep(Auto(), "upper-first"))
    state = solver.init(setup.lower, ones)._replace(lower_optimizer=setup.state)
    state, info = solver.step(state, [setup.batch], setup.meta)
    leaves = tree.map(lambda leaf: leaf.detach().requires_grad_(), setup.lower)
    losses, _ = setup.objective.per_example_loss(leaves, setup.batch)
    found = torch.autograd.grad(losses.mean(), leaves.values(), allow_unused=True)
    grads = dict(zip(leaves, found, strict=True))
    with torch.no_grad():
        expected, _ = setup.optimizer.update(grads, setup.state, setup.lower)
    torch.testing.assert_close(state.lower_params, expected, rtol=1e-12, atol=1e-12)
    assert info.notes == ()


def test_every_parameter_that_sees_anything_gets_a_gradient(setup):
    leaves = tree.map(lambda leaf: leaf.detach().requires_grad_(), setup.lower)
    losses, _ = setup.objective.per_example_loss(leaves, setup.batch)
    found = torch.autograd.grad(losses.sum(), leaves.values(), allow_unused=True)
    without = {name for name, grad in zip(leaves, found, strict=True) if grad is None}
    assert without <= {"model.vision_tower.embeddings.mask_token"}


def test_owners_of_rows(setup):
    owners = row_owners(setup.batch)
    if "pixel_values" not in setup.batch:
        assert owners == {}
        return
    tiles = setup.batch["num_patches"]
    assert sorted(owners) == sorted({int(tiles.sum()), len(setup.batch["pixel_values"])})
    for size, owner in owners.items():
        assert owner.bincount(minlength=4).tolist() == (tiles * size // tiles.sum()).tolist()
        assert owner.tolist() == sorted(owner.tolist())


@FORWARD_MODE
def test_rows_beside_an_example_do_not_change_its_product(setup):
    """μ is known before the lower pass, so ⟨μ, ∇ℓ_i⟩ does not depend on the weights."""
    one_step = OneStep(Ghost(), "upper-first")
    whole = by_route(setup, one_step)
    for row in range(4):
        alone = {name: torch.eye(4, dtype=torch.float64)[row] - 1 for name in whole}
        product = by_route(replace(setup, upper=alone), one_step)
        torch.testing.assert_close(product, whole, rtol=1e-9, atol=1e-12)
