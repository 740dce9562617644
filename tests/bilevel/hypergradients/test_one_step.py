"""Every route × optimizer × model against differences through the whole step, and each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bilevel import (
    SGD,
    Adam,
    Adamax,
    AdamW,
    Auto,
    BilevelProblem,
    BilevelSolver,
    CentralDifference,
    Dot,
    Ghost,
    Jvp,
    OneStep,
    PerExample,
    RAdam,
    Reverse,
    WarmupCosine,
    tree,
)
from bilevel.autodiff.gradient import upper_gradient
from tests.bilevel.comparing import relative
from tests.bilevel.run_case import assert_matches_differences, run_case_step, warm
from tests.bilevel.run_window import run_step
from tests.bilevel.variants import pick
from tests.bilevel.zoo import CASES, build
from tests.oracles import random_like, slope, upper_after_step

OPTIMIZERS = {
    "sgd": SGD(0.3),
    "momentum": SGD(0.3, 0.8),
    "nesterov": SGD(0.3, 0.8, nesterov=True, weight_decay=0.1),
    "adam": Adam(0.05, (0.8, 0.9), 1e-3),
    "adamw": AdamW(WarmupCosine(0.05, 2, 20), weight_decay=0.1),
}
LOWER_FIRST = [Auto(), PerExample(), PerExample(entries_limit=0), Jvp(), CentralDifference()]
UPPER_FIRST = [Auto(), Ghost(), PerExample(), Jvp(), CentralDifference()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("name", CASES)
def test_lower_first_is_exact_by_every_route(name, optimizer):
    case = build(name)
    reverse = run_case_step(case, optimizer, OneStep(Reverse())).hypergradient
    assert_matches_differences(case, optimizer, reverse)
    for route in LOWER_FIRST:
        result = run_case_step(case, optimizer, OneStep(route))
        assert [micro.note for micro in result.passed.micro_batches] == [None]
        limit = 1e-6 if isinstance(route, CentralDifference) else 1e-10
        assert relative(result.hypergradient, reverse) <= limit, route


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("name", CASES)
def test_upper_first_routes_agree(name, optimizer):
    case = build(name)
    reverse = run_case_step(case, optimizer, OneStep(Reverse(), "upper-first")).hypergradient
    for route in UPPER_FIRST:
        result = run_case_step(case, optimizer, OneStep(route, "upper-first"))
        limit = 1e-6 if isinstance(route, CentralDifference) else 1e-10
        assert relative(result.hypergradient, reverse) <= limit, route


@pytest.mark.parametrize("name", ["mlp", "dropout"])
def test_upper_first_is_exact_for_sgd_given_v_at_the_old_parameters(name):
    """Then μ = −lr v, and only v differs from lower-first: differences with v held at θ."""
    case, optimizer = build(name), OPTIMIZERS["nesterov"]
    result = run_case_step(case, optimizer, OneStep(Ghost(), "upper-first"))
    params, state = warm(case, optimizer)
    torch.manual_seed(11)
    random = torch.get_rng_state()
    v = upper_gradient(case.problem, params, case.upper_params, case.upper_batch).lower
    assert result.upper.lower is None  # dropped, once μ is made of it

    class Linearised:
        lower_loss = case.problem.lower_loss

        def upper_loss(new_params, upper_params, batch):
            step = tree.axpy(-1.0, params, new_params)
            direct = 0.01 * upper_params["table"].square().sum()
            return tree.vdot(v, step) + direct

    function = upper_after_step(
        Linearised, optimizer, params, state, case.batch, case.upper_batch, random, None
    )
    direction = random_like(case.upper_params, 0)
    expected = slope(function, case.upper_params, direction)
    assert abs(float(tree.vdot(result.hypergradient, direction)) / expected - 1.0) <= 1e-6


@pytest.mark.parametrize("differentiate_clip", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_active_clip(name, kind, differentiate_clip):
    case = build(name)
    clip = {"max_norm": 0.05, "differentiate_clip": differentiate_clip}
    optimizer = SGD(0.3, **clip) if kind == "sgd" else Adam(0.05, (0.8, 0.9), 1e-3, **clip)
    reverse = run_case_step(case, optimizer, OneStep(Reverse()))
    assert tree.norm(reverse.passed.grads) > 0.1
    assert_matches_differences(case, optimizer, reverse.hypergradient)
    for route in LOWER_FIRST[:-1]:
        found = run_case_step(case, optimizer, OneStep(route)).hypergradient
        assert relative(found, reverse.hypergradient) <= 1e-10, route


@pytest.mark.parametrize("order", ["lower-first", "upper-first"])
@pytest.mark.parametrize("name", ["mlp", "encoder", "vision"])
def test_dot_on_single_examples_equals_the_batch(name, order):
    case, optimizer = build(name), OPTIMIZERS["adam"]
    together = run_case_step(case, optimizer, OneStep(Reverse(), order))
    singles = [pick(case.batch, [row]) for row in range(5)]
    for route in (Dot(), Auto(), Jvp()):
        alone = run_case_step(case, optimizer, OneStep(route, order), batches=singles)
        assert relative(alone.hypergradient, together.hypergradient) <= 1e-10
        assert relative(alone.lower_params, together.lower_params) <= 1e-12


@pytest.mark.parametrize("order", ["lower-first", "upper-first"])
@pytest.mark.parametrize("route", [Auto(), PerExample(), Jvp(), Reverse(), CentralDifference()])
@pytest.mark.parametrize("name", ["attention", "tiles"])
def test_unequal_micro_batches_equal_the_batch(name, route, order):
    case, optimizer = build(name), OPTIMIZERS["adamw"]
    together = run_case_step(case, optimizer, OneStep(Reverse(), order))
    pieces = [pick(case.batch, [0, 1, 2]), pick(case.batch, [3, 4])]
    apart = run_case_step(case, optimizer, OneStep(route, order), batches=pieces)
    limit = 1e-6 if isinstance(route, CentralDifference) else 1e-10
    assert relative(apart.hypergradient, together.hypergradient) <= limit
    assert relative(apart.passed.grads, together.passed.grads) <= 1e-12


def test_zero_gradients_leave_adam_finite_and_exact():
    """Dead units, unused rows and unused parameters, from a cold state: nothing is NaN."""
    case = build("mlp")
    case.params["layers.0.bias"][:] = 0.0
    case.params["head.weight"][:, 0] = 0.0
    case.params["gain"][0] = 0.0
    optimizer = Adam(0.05, (0.8, 0.9), 1e-2)
    for order, routes in (("lower-first", LOWER_FIRST), ("upper-first", UPPER_FIRST)):
        reverse = run_case_step(
            case, optimizer, OneStep(Reverse(), order), warm_steps=0
        ).hypergradient
        assert tree.allfinite(reverse)
        for route in routes:
            found = run_case_step(
                case, optimizer, OneStep(route, order), warm_steps=0
            ).hypergradient
            limit = 1e-6 if isinstance(route, CentralDifference) else 1e-10
            assert relative(found, reverse) <= limit


def test_unused_parameters_get_no_gradient_and_stay():
    case = build("mlp")
    for route in (Auto(), Jvp(), PerExample()):
        result = run_case_step(case, AdamW(0.1, weight_decay=0.5), OneStep(route), warm_steps=0)
        assert result.passed.grads["unused"] is None
        assert torch.equal(result.lower_params["unused"], case.params["unused"])


def test_a_weight_of_zero_still_has_its_derivative():
    case, optimizer = build("mlp"), SGD(0.3)
    result = run_case_step(case, optimizer, OneStep())
    weights = result.passed.micro_batches[0].weights.detach()
    assert float(weights[4]) == 0.0
    assert abs(float(result.hypergradient["table"][4])) > 1e-4
    assert_matches_differences(case, optimizer, result.hypergradient)


@pytest.mark.parametrize("order", ["lower-first", "upper-first"])
def test_direction_decay_averages_v_with_bias_correction(order):
    """The third hypergradient is that of a linear upper loss with the averaged slope."""
    case, optimizer, rho = build("mlp"), SGD(0.3), 0.9
    averaged, plain = OneStep(Jvp(), order, direction_decay=rho), OneStep(Jvp(), order)
    params, state, vs = case.params, optimizer.init(case.params), []
    direction = averaged.init(optimizer, params, case.upper_params)

    def step(one_step, problem, direction=None):
        return run_step(
            one_step,
            problem,
            optimizer,
            params,
            case.upper_params,
            state,
            [case.batch],
            case.upper_batch,
            direction,
        )

    for _ in range(3):
        result = step(averaged, case.problem, direction)
        at = params if order == "upper-first" else result.lower_params
        vs.append(upper_gradient(case.problem, at, case.upper_params, case.upper_batch).lower)
        before = params, state
        params, state, direction = result.lower_params, result.optimizer_state, result.direction
    params, state = before
    weights = [rho**2, rho, 1.0]
    average = tree.zeros_like(params)
    for weight, v in zip(weights, vs, strict=True):
        average = tree.axpy(weight / sum(weights), v, average)

    def linear(lower, upper, batch):
        return tree.vdot(average, lower) + 0.01 * upper["table"].square().sum()

    expected = step(plain, replace(case.problem, upper_loss=linear))
    assert relative(result.hypergradient, expected.hypergradient) <= 1e-12
    assert int(direction.updates) == 3
    corrected = tree.scale(1.0 / (1.0 - rho**3), direction.average)
    assert relative(corrected, average) <= 1e-12


@pytest.mark.parametrize(
    ("optimizer", "blind"),
    [
        (Adam(0.1), True),
        (Adam(0.1, eps=1.0), False),
        (RAdam(0.1), False),
        (Adamax(0.1), True),
        (SGD(0.1, momentum=0.9), False),
    ],
    ids=str,
)
def test_the_note_on_a_cold_step_is_there_where_its_derivative_is_near_zero(optimizer, blind):
    """Beside the derivative of SGD's step at the same rate, ten times as large at least."""
    x = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).reshape(3, 2)
    problem = BilevelProblem(
        lambda t, p, b: (p["a"].exp() * (b @ t["w"] - 1.0).square()).mean(),
        lambda t, p, b: (b @ t["w"]).square().mean(),
    )

    def stepped(optimizer):
        solver = BilevelSolver(problem, optimizer, SGD(1.0), OneStep())
        theta = {"w": torch.ones(2, dtype=torch.float64)}
        return solver.step(solver.init(theta, {"a": torch.zeros(3).double()}), [x], x)[1]

    info, plain = stepped(optimizer), stepped(SGD(0.1))
    assert any("cold" in note for note in info.notes) == blind
    assert (float(info.hypergradient_norm) < 0.1 * float(plain.hypergradient_norm)) == blind


def test_learned_numbers_are_not_near_zero_from_a_cold_state():
    x = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).reshape(3, 2)
    problem = BilevelProblem(
        lambda t, p, b: (b @ t["w"] - 1.0).square().mean(),
        lambda t, p, b: (b @ t["w"]).square().mean(),
    )
    solver = BilevelSolver(
        problem, Adam(0.1), SGD(1.0), OneStep(), hyperparameters=lambda p: {"lr": p["log"].exp()}
    )
    state = solver.init({"w": torch.ones(2).double()}, {"log": torch.tensor(-2.0).double()})
    _, info = solver.step(state, [x], x)
    assert not any("cold" in note for note in info.notes)
    assert float(info.hypergradient_norm) > 0.01
