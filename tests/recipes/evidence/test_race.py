"""The race: the original's step is what its description says, and ours is the exact one."""

from __future__ import annotations

import json
import math

import pytest
import torch

from bilevel import SGD, AdamW, BilevelSolver, Dot, OneStep, tree
from recipes.evidence.bench import report
from recipes.evidence.bench.race import contenders, measure
from recipes.evidence.bench.race.model import SHAPES, internvl_config, make_race
from recipes.evidence.bench.race.original import MAX_NORM, Adamw, Original

TINY = SHAPES["tiny"]
DOUBLE = torch.float64


@pytest.fixture
def race():
    race = make_race(TINY, DOUBLE)
    race.weights["deviation"] = race.weights["deviation"].double()
    return race


def batch(race, size, seed):
    found = race.batch(size, seed)
    return {n: t.double() if t.is_floating_point() else t for n, t in found.items()}


def gradients(race, loss):
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in race.params.items()}
    found = torch.autograd.grad(loss(leaves), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def test_the_full_shape_is_internvl3_1b():
    from transformers import InternVLForConditionalGeneration

    with torch.device("meta"):
        model = InternVLForConditionalGeneration(internvl_config(SHAPES["full"]))
    assert sum(leaf.numel() for leaf in model.parameters()) == 938_193_024
    assert SHAPES["full"].tokens == 697


def test_the_originals_losses_are_those_of_the_problem(race):
    """Full-sequence softmax and head at the label positions: the same numbers."""
    original, objective = Original(race), race.objective
    one = batch(race, 1, 3)
    weighted = objective.problem().lower_loss(race.params, race.weights, one)
    raw = race.weights["deviation"]
    assert abs(float(original.lower_loss(raw, one).detach()) - float(weighted)) < 1e-6
    upper = objective.upper_loss(race.params, race.weights, one)
    assert abs(float(original.upper_loss(one).detach()) - float(upper)) < 1e-6


def test_the_originals_iteration(race):
    """A step of clipped AdamW, and −⟨v, ∇ℓ⟩ at θ' with v there, for the row of the example."""
    lower, upper = batch(race, 1, 3), batch(race, 1, 4)
    problem, raw = race.objective.problem(), race.weights
    before = tree.map(torch.clone, race.params)
    original = Original(race)
    grads = gradients(race, lambda leaves: problem.lower_loss(leaves, raw, lower))
    found = original.iteration(lower, upper)
    one = Adamw()
    # That AdamW adds ε to √s before the bias correction, which makes ε/√c₂ of it.
    eps = one.eps / math.sqrt(1.0 - one.beta2)
    optimizer = AdamW(one.lr, eps=eps, weight_decay=one.decay, max_norm=MAX_NORM)
    expected, _ = optimizer.update(grads, optimizer.init(before), before)
    for name, leaf in race.params.items():
        torch.testing.assert_close(leaf, expected[name], rtol=0.0, atol=1e-7)
    v = gradients(race, lambda leaves: problem.upper_loss(leaves, raw, upper)[0])
    losses = gradients(race, lambda leaves: problem.per_example_loss(leaves, lower)[0].sum())
    row = int(lower["index"][0])
    assert abs(float(found[row]) + float(tree.vdot(v, losses))) < 1e-3 * abs(float(found[row]))
    assert int((found != 0.0).sum()) == 1


def test_ours_is_the_exact_hypergradient(race):
    lower, upper = batch(race, 1, 3), batch(race, 1, 4)
    one = Adamw()
    optimizer = AdamW(one.lr, weight_decay=one.decay, max_norm=MAX_NORM)
    solver = BilevelSolver(race.objective.problem(), optimizer, SGD(1.0), OneStep(Dot()))
    state = solver.init(race.params, race.weights)._replace(
        lower_optimizer=tree.map(torch.clone, race.state)
    )
    ours = contenders.Resident(race, OneStep(Dot()))
    for _ in range(3):  # Cold moments have a hypergradient of almost 0.
        after, _ = solver.advance(state, [[lower]], upper)
        expected = state.upper_params["deviation"] - after.upper_params["deviation"]
        state = after._replace(upper_params=race.weights)
        found = ours.iteration(lower, upper)
    row = int(lower["index"][0])
    assert abs(float(found[row]) - float(expected[row])) < 1e-6 * abs(float(expected[row]))
    for name, leaf in race.params.items():
        torch.testing.assert_close(leaf, state.lower_params[name], rtol=0.0, atol=1e-8)


def test_rows_hold_together(tmp_path):
    race = make_race(TINY, torch.float32)
    rows = measure.measure(race, rounds=1, batch_size=2)
    by_route = {row["route"]: row for row in rows}
    assert list(by_route) == [*measure.ROUTES]
    assert by_route["floor"]["overhead_vs_floor"] == 1.0
    assert by_route["original"]["times_faster_than_original"] == 1.0
    assert by_route["original"]["peak_over_original"] == 1.0
    for row in rows:
        assert row["peak_bytes"] == race.held_bytes + row["peak_saved_bytes"]
    table = measure.table(rows)
    assert all(route in table for route in measure.ROUTES)
    path = tmp_path / "bench.json"
    path.write_text(json.dumps([{"route": "jvp", "model": "decoder, 5 M, batch 1"}]))
    both = report.merged(path, rows)
    assert [row["route"] for row in both] == ["jvp", *measure.ROUTES]
    path.write_text(json.dumps(both))
    again = report.merged(path, [rows[0] | {"cpu_seconds": 1.0}])
    assert [row["route"] for row in again] == ["jvp", "floor"]
    assert again[1]["cpu_seconds"] == 1.0
