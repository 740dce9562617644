"""Comparison of hypergradients, stationarity of the lower level, movement of φ."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bilevel import (
    SGD,
    Adam,
    BilevelProblem,
    BilevelSolver,
    CentralDifference,
    Identity,
    Jvp,
    OneStep,
    Penalty,
    Reverse,
    Unrolled,
    compare_hypergradients,
    movement,
    stationarity,
    tree,
)
from tests.bilevel.comparing import same_bits
from tests.bilevel.quadratic import Quadratic
from tests.bilevel.run_window import run_window
from tests.bilevel.variants import pick
from tests.bilevel.zoo import build

F64 = torch.float64
LR = 0.05


def quadratic_setting(**settings):
    quadratic = Quadratic(**settings)
    solver = BilevelSolver(quadratic.problem, SGD(LR), SGD(0.1), OneStep(Jvp()))
    return quadratic, solver, solver.init(quadratic.w, quadratic.x)


def test_cosine_norm_ratio_and_signs_are_those_of_the_closed_forms():
    quadratic, solver, state = quadratic_setting()
    methods = {
        "exact": OneStep(Jvp()),
        "reverse": OneStep(Reverse()),
        "identity": OneStep(Jvp(), update_derivative=Identity()),
    }
    found = compare_hypergradients(solver, [(state, [[None]], 0)], methods)
    direct, v = quadratic.H @ quadratic.x, quadratic.v(quadratic.step(LR))
    exact, identity = (
        (direct - gain * quadratic.C @ v).numpy().astype(np.float64) for gain in (LR, 1.0)
    )
    assert found.names == ("exact", "reverse", "identity")
    sizes = [np.linalg.norm(vector) for vector in (exact, exact, identity)]
    assert found.norms[0] == pytest.approx(sizes, rel=1e-12)
    one = found.points[0]["exact", "identity"]
    assert one.cosine == pytest.approx(exact @ identity / (sizes[0] * sizes[2]), rel=1e-12)
    assert one.norm_ratio == pytest.approx(sizes[2] / sizes[0], rel=1e-12)
    assert one.same_sign == np.mean(np.sign(exact) == np.sign(identity))
    assert found.points[0]["exact", "reverse"] == pytest.approx((1.0, 1.0, 1.0), rel=1e-12)
    assert found.points[0]["reverse", "identity"].cosine == pytest.approx(one.cosine, rel=1e-12)
    assert found.mean("exact", "identity") == one


def test_along_a_run():
    """A generator takes the run; nothing of the run changes, memories go along."""
    case = build("dropout")
    solver = BilevelSolver(case.problem, Adam(0.05), SGD(0.5), Unrolled(), unroll_steps=2)
    batches = [[pick(case.batch, [0, 1, 2])], [pick(case.batch, [2, 3, 4])]]

    def run(states):
        state = states[0]
        for _ in range(3):
            yield state, batches, case.upper_batch
            state, _ = solver.window(state, batches, case.upper_batch)
            states.append(state)

    start = solver.init(case.params, case.upper_params)
    methods = {
        "unrolled": Unrolled(),
        "last": OneStep(Jvp()),
        "difference": OneStep(CentralDifference()),
        "penalty": Penalty(10.0),
    }
    watched, alone = [start], [start]
    torch.manual_seed(7)
    found = compare_hypergradients(solver, run(watched), methods)
    torch.manual_seed(7)
    for _ in run(alone):
        pass
    assert same_bits(watched[-1], alone[-1])
    assert len(found.points) == len(found.norms) == 3
    assert [point["last", "difference"].cosine for point in found.points] == pytest.approx(
        [1.0] * 3, abs=1e-7
    )
    # The comparison's own window is the run's window.
    torch.manual_seed(7)
    state = start
    for norms in found.norms:
        state, infos = solver.window(state, batches, case.upper_batch)
        assert float(infos[-1].hypergradient_norm) == pytest.approx(norms[0], rel=1e-12)
    # The penalty's copy went from window to window.
    again = replace(solver, hypergradient=Penalty(10.0), upper_optimizer=SGD(0.0))
    torch.manual_seed(7)
    memory, norms = None, []
    for state in watched[:-1]:
        random = torch.get_rng_state()
        memory = Penalty(10.0).init(Adam(0.05), *state[:2]) if memory is None else memory
        start = *state[:2], state.lower_optimizer
        result = run_window(
            again.hypergradient,
            solver.problem,
            Adam(0.05),
            *start,
            batches,
            case.upper_batch,
            memory,
        )
        memory = result.memory
        norms.append(float(tree.norm(result.hypergradient)))
        torch.set_rng_state(random)
        solver.window(state, batches, case.upper_batch)
    assert [row[3] for row in found.norms] == pytest.approx(norms, rel=1e-12)


def test_memories_may_be_given():
    """With y at its minimum the penalty is its closed form at once."""
    quadratic, solver, _ = quadratic_setting()
    solution, strength = quadratic.solution(), 1e4
    solver = replace(solver, lower_optimizer=SGD(0.0))
    state = solver.init(solution, quadratic.x)
    penalty = Penalty(strength)
    memory = penalty.init(SGD(0.0), solution, quadratic.x)
    memory = memory._replace(params=quadratic.penalised(strength))
    methods = {"penalty": penalty, "one": OneStep(Jvp())}
    found = compare_hypergradients(
        solver, [(state, [[None]], 0)], methods, memories={"penalty": memory}
    )
    implicit = float(quadratic.implicit().norm())
    assert found.norms[0][0] == pytest.approx(implicit, rel=1e-3)
    cold = compare_hypergradients(solver, [(state, [[None]], 0)], methods)
    direct = float((quadratic.H @ quadratic.x).norm())
    assert cold.norms[0] == pytest.approx((direct, direct), rel=1e-12)


def test_hypergradients_of_zero_are_left_out():
    """φ without influence on the lower loss: 0 by any method but the direct part."""
    problem = BilevelProblem(
        lambda lower, upper, batch: lower.square().sum() + 0.0 * upper["a"].sum(),
        lambda lower, upper, batch: lower.sum() + batch * upper["a"].sum(),
    )
    solver = BilevelSolver(problem, SGD(0.1), SGD(0.1))
    upper = {"a": torch.tensor([1.0, -1.0], dtype=F64), "b": torch.ones(3, dtype=F64)}
    state = solver.init(torch.ones(2, dtype=F64), upper)
    methods = {"one": OneStep(Jvp()), "identity": OneStep(update_derivative=Identity())}
    windows = [(state, [[None]], batch) for batch in (0.0, 2.0)]
    found = compare_hypergradients(solver, windows, methods)
    assert found.norms == ((0.0, 0.0), pytest.approx((math.sqrt(8), math.sqrt(8))))
    assert all(math.isnan(value) for value in found.points[0]["one", "identity"])
    assert found.mean("one", "identity") == pytest.approx((1.0, 1.0, 1.0))


def test_the_printed_table():
    _, solver, state = quadratic_setting()
    methods = {"exact": OneStep(Jvp()), "identity": OneStep(update_derivative=Identity())}
    adam = replace(solver, lower_optimizer=Adam(0.1))
    found = compare_hypergradients(adam, [(adam.init(*state[:2]), [[None]], 0)] * 2, methods)
    text = str(found).splitlines()
    assert text[0] == "hypergradients at 2 points, against 'exact'"
    assert text[1].split() == ["norm", "cosine", "least", "cosine", "norm", "ratio", "same", "sign"]
    one = found.mean("exact", "identity")
    assert text[3].split() == [
        "identity",
        f"{found.norms[0][1]:.2e}",
        f"{one.cosine:.4f}",
        f"{one.cosine:.4f}",
        f"{one.norm_ratio:.3g}",
        f"{one.same_sign:.1%}",
    ]
    assert len({len(line) for line in text[1:2] + text[3:4]}) == 1
    assert sum("cold" in line for line in text) == 2  # said once per method
    many = replace(found, notes={"exact": ("first", "second"), "identity": ()})
    assert str(many).splitlines()[4:] == ["  exact: second (last of 2 notes)"]


def test_what_cannot_be_compared():
    _, solver, state = quadratic_setting()
    with pytest.raises(ValueError, match=r"at least two to compare, found \['a'\]"):
        compare_hypergradients(solver, [(state, [[None]], 0)], {"a": OneStep(Jvp())})
    two = {"a": OneStep(Jvp()), "b": Unrolled(steps=3)}
    with pytest.raises(ValueError, match="expected at least one"):
        compare_hypergradients(solver, [], two)
    with pytest.raises(ValueError, match=r"steps=3 do not fit a window of unroll_steps=1"):
        compare_hypergradients(solver, [(state, [[None]], 0)], two)


def batches_of_noise(sizes, seed=0):
    """A lower loss whose gradient on a batch is the mean of its rows plus that of a quadratic."""
    generator = torch.Generator().manual_seed(seed)
    problem = BilevelProblem(
        lambda lower, upper, batch: (batch @ lower).mean() + 0.5 * upper * lower.square().sum(),
        lambda lower, upper, batch: lower.sum(),
        batch_size=len,
    )
    batches = [torch.randn(size, 7, dtype=F64, generator=generator) for size in sizes]
    return problem, batches, torch.zeros(7, dtype=F64), torch.ones((), dtype=F64)


def test_stationarity_of_equal_batches_is_the_standard_error():
    problem, batches, lower, upper = batches_of_noise([4] * 10)
    found = stationarity(problem, lower, upper, batches)
    grads = torch.stack([batch.mean(0) for batch in batches])
    assert found.batches == 10
    assert found.grad_norm == pytest.approx(float(grads.mean(0).norm()), rel=1e-12)
    error = math.sqrt(float(grads.var(0).sum()) / 10)
    assert found.noise_norm == pytest.approx(error, rel=1e-10)
    rms = math.sqrt(float(grads.square().sum()) / 10)
    assert found.alignment == pytest.approx(found.grad_norm / rms, rel=1e-12)
    assert f"{found.grad_norm:.2e} over 10 batches" in str(found)


def test_stationarity_weighs_batches_by_their_size():
    problem, batches, lower, upper = batches_of_noise([1, 5, 2])
    found = stationarity(problem, lower, upper, batches)
    everything = torch.cat(batches).mean(0)
    assert found.grad_norm == pytest.approx(float(everything.norm()), rel=1e-12)
    weights = torch.tensor([1, 5, 2], dtype=F64) / 8
    grads = torch.stack([batch.mean(0) for batch in batches])
    spread = float(weights @ (grads - everything).square().sum(1))
    squares = float(weights.square().sum())
    expected = math.sqrt(spread * squares / (1 - squares))
    assert found.noise_norm == pytest.approx(expected, rel=1e-10)


def test_the_noise_estimate_is_unbiased():
    """At the minimum E‖ḡ‖² is the noise: both averaged over draws, within four standard errors."""
    squares, noises = [], []
    for seed in range(400):
        problem, batches, lower, upper = batches_of_noise([2, 3, 4], seed)
        found = stationarity(problem, lower, upper, batches)
        squares.append(found.grad_norm**2)
        noises.append(found.noise_norm**2)
    exact = 7 / 9  # 7 entries, 9 rows of variance 1
    for values in (squares, noises):
        error = float(np.std(values)) / 20
        limit = 4 * error + (0.05 if values is noises else 0.0)  # n_b-weighted rows: not i.i.d.
        assert abs(float(np.mean(values)) - exact) <= limit


def test_one_batch_and_no_batch():
    problem, batches, lower, upper = batches_of_noise([3])
    found = stationarity(problem, lower, upper, batches)
    assert math.isnan(found.noise_norm)
    assert found.alignment == pytest.approx(1.0, rel=1e-12)
    assert "one batch says nothing of noise" in str(found)
    with pytest.raises(ValueError, match="expected at least one, found none"):
        stationarity(problem, lower, upper, [])


def test_stationarity_puts_random_numbers_back():
    case = build("dropout")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    once = stationarity(case.problem, case.params, case.upper_params, [case.batch] * 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert once.noise_norm > 0.0  # each batch with a dropout of its own
    assert once == stationarity(case.problem, case.params, case.upper_params, [case.batch] * 2)


def test_movement():
    before = {"table": torch.tensor([1.0, 1.0, 1.0, 1.0]), "scale": torch.tensor(2.0)}
    after = {"table": torch.tensor([1.0, 1.5, -2.0, 3.0]), "scale": torch.tensor(1.75)}
    found = movement(before, after, {"table": (-1.0, 3.0)})
    scale, table = found.leaves
    assert (scale.name, scale.entries, scale.mean, scale.largest) == ("scale", 1, 0.25, 0.25)
    assert (scale.moved, scale.at_bound) == (1.0, None)
    assert (table.name, table.entries, table.mean, table.largest) == ("table", 4, 1.375, 3.0)
    assert (table.moved, table.at_bound) == (0.75, 0.5)
    lines = str(found).splitlines()
    assert lines[0].split() == ["entries", "mean", "|Δ|", "largest", "|Δ|", "moved", "at", "bound"]
    assert lines[2].split() == ["table", "4", "1.38e+00", "3.00e+00", "75.0%", "50.0%"]
    every = movement(before, after, (-1.0, 3.0))
    assert [leaf.at_bound for leaf in every.leaves] == [0.0, 0.5]
    assert movement(before, before).leaves[1] == ("table", 4, 0.0, 0.0, 0.0, None)
    with pytest.raises(ValueError, match=r"leaves of \['scale', 'table'\], found \['tabel'\]"):
        movement(before, after, {"tabel": (0.0, 1.0)})
    with pytest.raises(ValueError, match=r"missing key\(s\): \['scale'\]"):
        movement(before, {"table": after["table"]})


def test_movement_of_a_bare_tensor_and_of_16_bits():
    found = movement(torch.zeros(2), torch.tensor([0.0, 2.0]), (0.0, 1.0))
    assert found.leaves[0] == ("value", 2, 1.0, 2.0, 0.5, 1.0)
    old = torch.full((1000,), 1.0, dtype=torch.bfloat16)
    assert movement(old, old + 0.0078125).leaves[0].mean == 0.0078125
    assert movement(torch.zeros(0), torch.zeros(0)).leaves[0][1:] == (0, 0.0, 0.0, 0.0, None)
