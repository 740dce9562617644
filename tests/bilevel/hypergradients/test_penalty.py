"""The value-function penalty: exact values, rates in λ, a second implementation, limits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bilevel import (
    SGD,
    Adam,
    AdamW,
    BilevelProblem,
    BilevelSolver,
    Jvp,
    OneStep,
    Penalty,
    PenaltyMemory,
    tree,
)
from tests.bilevel.comparing import loglog_slope, relative, same_bits
from tests.bilevel.problems import weights_from_losses
from tests.bilevel.quadratic import Quadratic
from tests.bilevel.run_window import run_window
from tests.bilevel.variants import pick
from tests.bilevel.zoo import Encoder, build, make, tokens
from tests.oracles import REGRESSION, VALIDATION, WEIGHTS, half_squares

F64 = torch.float64
STILL = SGD(0.0)


def at_solutions(quadratic, strength, method=None):
    """The window at θ = w* and y = y*_λ, from which nothing moves."""
    method = method or Penalty(strength, optimizer=STILL)
    solution, copy = quadratic.solution(), quadratic.penalised(strength)
    memory = method.init(STILL, solution, quadratic.x)._replace(params=copy)
    state = STILL.init(solution)
    return run_window(
        method, quadratic.problem, STILL, solution, quadratic.x, state, [[None]], 0, memory
    )


@pytest.mark.parametrize("strength", [0.5, 10.0, 1e3, 1e5])
def test_closed_form_at_the_solutions(strength):
    """H x − λ C (Q + λ A)⁻¹ (Q w* + f), and the figures."""
    quadratic = Quadratic()
    found = at_solutions(quadratic, strength)
    solution, copy = quadratic.solution(), quadratic.penalised(strength)
    v = quadratic.v(solution)
    shift = -torch.linalg.solve(quadratic.Q + strength * quadratic.A, v)
    expected = quadratic.H @ quadratic.x + strength * quadratic.C @ shift
    rtol = max(1e-12, 1e-14 * strength)  # λ times the rounding of the difference
    torch.testing.assert_close(found.hypergradient, expected, rtol=rtol, atol=rtol)
    figures = found.figures
    assert float(figures["strength"]) == strength
    assert float(figures["distance"]) == pytest.approx(float(shift.norm()), rel=1e-8)
    gap = 0.5 * shift @ quadratic.A @ shift
    assert float(figures["gap"]) == pytest.approx(float(gap), rel=1e-8, abs=1e-14)
    upper = quadratic.problem.upper_loss
    assert float(found.upper_loss) == pytest.approx(float(upper(solution, quadratic.x, 0)))
    assert float(figures["copy_upper_loss"]) == pytest.approx(float(upper(copy, quadratic.x, 0)))
    assert found.notes == ()
    assert torch.equal(found.lower_params, solution)


def test_rates_in_the_strength():
    """Bias O(1/λ), y − θ O(1/λ), the lower loss's excess O(1/λ²)."""
    quadratic = Quadratic()
    implicit = quadratic.implicit()
    strengths = [1e2, 3e2, 1e3, 3e3, 1e4]
    found = [at_solutions(quadratic, strength) for strength in strengths]
    bias = [float((one.hypergradient - implicit).norm()) for one in found]
    assert loglog_slope(strengths, bias) == pytest.approx(-1.0, abs=0.02)
    distances = [float(one.figures["distance"]) for one in found]
    assert loglog_slope(strengths, distances) == pytest.approx(-1.0, abs=0.02)
    gaps = [float(one.figures["gap"]) for one in found]
    assert loglog_slope(strengths, gaps) == pytest.approx(-2.0, abs=0.04)


def test_the_limit_is_the_implicit_gradient():
    """And with one extrapolation, 2 h(2λ) − h(λ), the 1/λ is gone."""
    quadratic = Quadratic()
    implicit = quadratic.implicit()
    found = {strength: at_solutions(quadratic, strength) for strength in (500.0, 1e3, 1e6)}
    assert relative(found[1e6].hypergradient, implicit) <= 2e-6
    once, twice = found[500.0].hypergradient, found[1e3].hypergradient
    assert relative(2 * twice - once, implicit) <= 2e-2 * relative(twice, implicit)


def test_an_unsolved_lower_level_costs_lambda_times_its_distance():
    quadratic = Quadratic()
    offset = 1e-2 * torch.ones(6, dtype=F64)
    for strength in (10.0, 1000.0):
        exact = at_solutions(quadratic, strength)
        method = Penalty(strength, optimizer=STILL)
        memory = exact.memory._replace(params=quadratic.penalised(strength))
        theta = quadratic.solution() + offset
        off = run_window(
            method,
            quadratic.problem,
            STILL,
            theta,
            quadratic.x,
            STILL.init(theta),
            [[None]],
            0,
            memory,
        )
        expected = -strength * quadratic.C @ offset
        torch.testing.assert_close(
            off.hypergradient - exact.hypergradient, expected, rtol=1e-8, atol=1e-9
        )
    assert any("is not at its minimum" in note for note in off.notes)


def test_it_converges_to_the_minimum_of_the_penalised_problem():
    """A single loop, one step of everything at a time; the minimum is known in closed form."""
    quadratic, strength = Quadratic(size=3, upper=2, spread=2.0), 20.0
    solver = BilevelSolver(quadratic.problem, SGD(0.3), SGD(0.05), Penalty(strength))
    state = solver.init(quadratic.w, quadratic.x)
    for _ in range(800):
        state, _ = solver.window(state, [[None]], 0)
    # dF_λ/dx is affine in x: solve it from its values at 0 and the unit vectors.
    quadratic.x = torch.zeros(2, dtype=F64)
    offset = at_solutions(quadratic, strength).hypergradient
    columns = []
    for unit in torch.eye(2, dtype=F64):
        quadratic.x = unit
        columns.append(at_solutions(quadratic, strength).hypergradient - offset)
    best = -torch.linalg.solve(torch.stack(columns, dim=1), offset)
    torch.testing.assert_close(state.upper_params, best, rtol=1e-9, atol=1e-11)
    quadratic.x = best
    torch.testing.assert_close(state.lower_params, quadratic.solution(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(
        state.memory.params, quadratic.penalised(strength), rtol=1e-9, atol=1e-11
    )
    assert int(state.memory.updates) == 800


def test_golden_influence_of_instance_weights():
    """Weighted ridge regression: λ → ∞ gives the influence functions of the golden table."""
    ridge = 0.5
    x, y = REGRESSION["x"], REGRESSION["y"]
    hessian = x.T @ (WEIGHTS[:, None] * x) + ridge * torch.eye(2, dtype=F64)
    solution = torch.linalg.solve(hessian, x.T @ (WEIGHTS * y))

    def lower_loss(lower, upper, batch):
        penalty = 0.5 * ridge * lower["w"].square().sum()
        return (upper["s"] * half_squares(lower, batch)).sum() + penalty

    problem = BilevelProblem(
        lower_loss, lambda lower, upper, batch: half_squares(lower, batch).sum()
    )
    strength = 1e6
    xv, yv = VALIDATION["x"], VALIDATION["y"]
    copy = torch.linalg.solve(
        xv.T @ xv + strength * hessian, xv.T @ yv + strength * x.T @ (WEIGHTS * y)
    )
    lower, upper = {"w": solution}, {"s": WEIGHTS}
    method = Penalty(strength, optimizer=STILL)
    memory = method.init(STILL, lower, upper)._replace(params={"w": copy})
    found = run_window(
        method, problem, STILL, lower, upper, STILL.init(lower), [[REGRESSION]], VALIDATION, memory
    )
    golden = [0.001514403292, 0.001331504344, 0.006598994056, -0.023176954733]
    assert found.hypergradient["s"].tolist() == pytest.approx(golden, rel=1e-5, abs=1e-9)


def by_hand(case, lower_optimizer, upper_optimizer, method, windows, batches, weighted):
    """The whole method again, in one loop and plain autograd.

    `weighted(theta, at, upper, batch)` is the lower loss at `at` with the features of `theta`.
    """

    def gradient(loss, leaves):
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return dict(zip(leaves, found, strict=True))

    def leaves_of(params):
        return {name: leaf.detach().clone().requires_grad_() for name, leaf in params.items()}

    def plus(left, right, factor):
        return {
            name: (0 if left[name] is None else left[name])
            + (0 if right[name] is None else factor * right[name])
            if left[name] is not None or right[name] is not None
            else None
            for name in left
        }

    theta, phi = case.params, case.upper_params
    copy = {name: leaf.clone() for name, leaf in theta.items()}
    mover = method.optimizer or lower_optimizer
    state, copy_state = lower_optimizer.init(theta), mover.init(copy)
    upper_state = upper_optimizer.init(phi)
    for updates in range(windows):
        lam = method.strength(updates) if callable(method.strength) else method.strength
        before = []
        for micros in batches:
            before.append(theta)
            leaves = leaves_of(theta)
            size = sum(len(micro["labels"]) for micro in micros)
            loss = sum(
                weighted(theta, leaves, phi, micro) * (len(micro["labels"]) / size)
                for micro in micros
            )
            with torch.no_grad():
                theta, state = lower_optimizer.update(gradient(loss, leaves), state, theta)
        steps = method.steps or len(batches)
        for k in range(steps):
            index = (len(batches) * steps - steps + k) % len(batches)
            leaves = leaves_of(copy)
            size = sum(len(micro["labels"]) for micro in batches[index])
            loss = sum(
                weighted(before[index], leaves, phi, micro) * (len(micro["labels"]) / size)
                for micro in batches[index]
            )
            loss = (case.problem.upper_loss(leaves, phi, case.upper_batch) + lam * loss) / (1 + lam)
            # The decay belongs to the lower loss.
            mild = replace(mover, weight_decay=mover.weight_decay * lam / (1 + lam))
            with torch.no_grad():
                copy, copy_state = mild.update(gradient(loss, leaves), copy_state, copy)
        everything = [micro for micros in batches for micro in micros]
        size = sum(len(micro["labels"]) for micro in everything)
        leaves = leaves_of(phi)
        direct = gradient(case.problem.upper_loss(copy, leaves, case.upper_batch), leaves)
        total = sum(
            (weighted(theta, copy, leaves, micro) - weighted(theta, theta, leaves, micro))
            * (len(micro["labels"]) / size)
            for micro in everything
        )
        hypergradient = plus(direct, gradient(total, leaves), lam)
        with torch.no_grad():
            phi, upper_state = upper_optimizer.update(hypergradient, upper_state, phi)
    return theta, phi, copy, hypergradient


def grow(updates):
    return 5.0 + 2.0 * updates


@pytest.mark.parametrize(
    "method",
    [
        Penalty(5.0),
        Penalty(grow, steps=1),
        Penalty(5.0, steps=5, optimizer=Adam(0.03, (0.8, 0.9), 1e-3)),
    ],
    ids=["fixed", "growing", "longer"],
)
def test_against_a_second_implementation(method):
    """Several windows of two lower steps, one of them in unequal micro-batches; AdamW, clip."""
    case = build("mlp")
    lower = AdamW(0.05, (0.8, 0.9), 1e-3, weight_decay=0.1, max_norm=0.5)
    upper = Adam(0.1)
    pieces = [pick(case.batch, [0, 1, 2]), pick(case.batch, [3, 4])]
    others = [pick(case.batch, [4, 1]), pick(case.batch, [2])]
    batches = [pieces, others]

    def weighted(theta, at, upper_params, micro):
        return case.problem.lower_loss(at, upper_params, micro)

    solver = BilevelSolver(case.problem, lower, upper, method, unroll_steps=2, accumulation=2)
    state = solver.init(case.params, case.upper_params)
    for _ in range(4):
        state, infos = solver.window(state, batches, case.upper_batch)
    theta, phi, copy, last = by_hand(case, lower, upper, method, 4, batches, weighted)
    assert relative(state.lower_params, theta) <= 1e-13
    assert relative(state.upper_params, phi) <= 1e-11
    assert relative(state.memory.params, copy) <= 1e-11
    assert float(infos[-1].hypergradient_norm) == pytest.approx(float(tree.norm(last)), rel=1e-9)
    assert infos[0].upper_loss is None
    assert float(infos[-1].figures["strength"]) == (
        grow(3) if callable(method.strength) else method.strength
    )
    assert float(infos[-1].upper_loss) == pytest.approx(
        float(case.problem.upper_loss(theta, phi, case.upper_batch)), rel=0.2
    )


def test_features_that_are_detached_are_those_of_theta():
    """An instance net on the losses: weights at y are the ones that θ's losses give."""
    torch.manual_seed(3)
    case = make(Encoder(), tokens, weights=weights_from_losses)
    lower, upper, method = SGD(0.1), SGD(0.5), Penalty(4.0, steps=2)

    def weighted(theta, at, upper_params, micro):
        with torch.no_grad():
            features = case.problem.per_example_loss(theta, micro)[1]
        weights = weights_from_losses(upper_params, micro, features)
        return (weights * case.problem.per_example_loss(at, micro)[0]).mean()

    solver = BilevelSolver(case.problem, lower, upper, method)
    state = solver.init(case.params, case.upper_params)
    for _ in range(3):
        state, _ = solver.step(state, [case.batch], case.upper_batch)
    theta, phi, copy, _ = by_hand(case, lower, upper, method, 3, [[case.batch]], weighted)
    assert relative(state.lower_params, theta) <= 1e-13
    assert relative(state.upper_params, phi) <= 1e-11
    assert relative(state.memory.params, copy) <= 1e-11

    # Not detached: the lower loss is one function of θ and φ.
    attached = replace(case, problem=replace(case.problem, detach_features=False))

    def whole(theta, at, upper_params, micro):
        return attached.problem.lower_loss(at, upper_params, micro)

    solver = replace(solver, problem=attached.problem)
    state = solver.init(case.params, case.upper_params)
    for _ in range(2):
        state, _ = solver.step(state, [case.batch], case.upper_batch)
    theta, phi, *_ = by_hand(attached, lower, upper, method, 2, [[case.batch]], whole)
    assert relative(state.upper_params, phi) <= 1e-11


def test_all_passes_over_a_batch_see_the_same_random_numbers():
    """With y = θ the difference is 0 to the last bit under dropout, and only then."""
    case = build("dropout")
    method = Penalty(1e4, optimizer=STILL)
    memory = method.init(STILL, case.params, case.upper_params)
    torch.manual_seed(5)
    found = run_window(
        method,
        case.problem,
        STILL,
        case.params,
        case.upper_params,
        STILL.init(case.params),
        [[pick(case.batch, [0, 1])], [pick(case.batch, [2, 3, 4])]],
        case.upper_batch,
        memory,
    )
    direct = 0.02 * case.upper_params["table"]
    torch.testing.assert_close(found.hypergradient["table"], direct, rtol=1e-12, atol=1e-15)
    assert float(found.figures["gap"]) == 0.0


@pytest.mark.parametrize("name", ["mlp", "dropout"])
def test_the_lower_level_is_trained_as_without_it(name):
    """θ and the random numbers, bit for bit; without an upper batch the memory stays."""
    case = build(name)
    lower = AdamW(0.05, weight_decay=0.1)
    solver = BilevelSolver(case.problem, lower, SGD(0.0), Penalty(5.0), unroll_steps=2)
    plain = replace(solver, hypergradient=OneStep(Jvp()))
    results = []
    for one, upper_batch in ((solver, case.upper_batch), (solver, None), (plain, None)):
        torch.manual_seed(5)
        state = one.init(case.params, case.upper_params)
        for _ in range(2):
            state, _ = one.window(state, [[case.batch]] * 2, upper_batch)
        results.append((state, torch.get_rng_state()))
    for state, random in results[1:]:
        assert same_bits(state.lower_params, results[0][0].lower_params)
        assert same_bits(state.lower_optimizer, results[0][0].lower_optimizer)
        assert torch.equal(random, results[0][1])
    assert same_bits(results[1][0].memory.params, case.params)
    assert int(results[1][0].memory.updates) == 0
    assert int(results[0][0].memory.updates) == 2


def test_memory_goes_through_named_tensors():
    """A resumed run is the uninterrupted one, bit for bit."""
    case = build("mlp")
    solver = BilevelSolver(
        case.problem, AdamW(0.05), Adam(0.1), Penalty(grow, steps=2), unroll_steps=2
    )

    def go(state, windows):
        for _ in range(windows):
            state, _ = solver.window(state, [[case.batch]] * 2, case.upper_batch)
        return state

    start = solver.init(case.params, case.upper_params)
    assert isinstance(start.memory, PenaltyMemory)
    for name, leaf in case.params.items():  # shared tensors cannot be saved to one file
        assert start.memory.params[name].data_ptr() != leaf.data_ptr()
    half = go(start, 2)
    named = {name: leaf.clone() for name, leaf in tree.flatten(half).items()}
    assert "memory/params/head.weight" in named
    assert "memory/optimizer_state/second_moment/head.weight" in named
    resumed = tree.unflatten(named, solver.init(case.params, case.upper_params))
    assert same_bits(go(resumed, 2), go(half, 2))


def test_a_hypergradient_that_is_not_finite_leaves_the_copy():
    case = build("mlp")
    problem = replace(
        case.problem,
        upper_loss=lambda lower, upper, batch: (
            case.problem.upper_loss(lower, upper, case.upper_batch) * batch
        ),
    )
    solver = BilevelSolver(problem, SGD(0.1), SGD(0.1), Penalty(5.0))
    state, _ = solver.step(solver.init(case.params, case.upper_params), [case.batch], 1.0)
    new, _ = solver.step(state, [case.batch], float("nan"))
    assert int(new.upper_skipped) == 1
    assert same_bits(new.memory, state.memory)
    assert same_bits(new.upper_params, state.upper_params)
    assert bool(tree.allfinite(new.lower_params))


def test_only_first_derivatives_are_taken():
    """Of operations that have no second ones."""

    class OnceOnly(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, b):
            return b * ctx.saved_tensors[0].cos()

    problem = BilevelProblem(
        lambda lower, upper, batch: (OnceOnly.apply(lower) * upper).sum(),
        lambda lower, upper, batch: lower.square().sum(),
    )
    lower, upper = torch.ones(3, dtype=F64), torch.full((3,), 2.0, dtype=F64)
    method = Penalty(4.0, optimizer=SGD(0.1))
    memory = method.init(SGD(0.3), lower, upper)
    found = run_window(
        method, problem, SGD(0.3), lower, upper, SGD(0.3).init(lower), [[None]], 0, memory
    )
    theta = lower - 0.3 * upper * lower.cos()
    copy = lower - 0.1 * (2 * lower + 4.0 * upper * lower.cos()) / 5.0
    torch.testing.assert_close(found.memory.params, copy, rtol=1e-14, atol=0)
    expected = 4.0 * (copy.sin() - theta.sin())
    torch.testing.assert_close(found.hypergradient, expected, rtol=1e-13, atol=0)


def test_what_is_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"Penalty: strength must lie in \(0, inf\), got 0\.0"):
        Penalty(0.0)
    with pytest.raises(ValueError, match=r"Penalty: steps must lie in \[1, inf\), got 0"):
        Penalty(1.0, steps=0)
    case = build("mlp")
    solver = BilevelSolver(case.problem, SGD(0.1), SGD(0.1), Penalty(lambda updates: -1.0))
    with pytest.raises(ValueError, match=r"strength must be positive, the schedule gave -1\.0"):
        solver.step(solver.init(case.params, case.upper_params), [case.batch], case.upper_batch)
