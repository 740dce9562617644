"""Routes as objects: what each declares, and a route of one's own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch

from bilevel import (
    SGD,
    Auto,
    BilevelProblem,
    BilevelSolver,
    CentralDifference,
    Dot,
    Ghost,
    Implicit,
    Jvp,
    OneStep,
    PerExample,
    Reverse,
    Unrolled,
    tree,
)
from bilevel.lower.lower_pass import lower_pass
from bilevel.lower.second_order import second_derivatives
from bilevel.problem import is_separable, weighted_mean
from tests.bilevel.comparing import relative, same_bits
from tests.bilevel.zoo import build
from tests.oracles import random_like

ROUTES = [Auto(), Dot(), Ghost(), PerExample(), Jvp(), Reverse(), CentralDifference()]


def test_what_routes_declare():
    assert [route.per_example for route in ROUTES] == [False, True, True, True, False, False, False]
    assert [route for route in ROUTES if route.needs_direction] == [Ghost()]
    assert [route for route in ROUTES if route.second_order] == [Auto(), *ROUTES[4:]]


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_hypergradients_take_the_routes_that_declare_what_they_need(route):
    case = build("mlp")
    scalar = BilevelProblem(case.problem.lower_loss, case.problem.upper_loss)

    def refused(make) -> bool:
        try:
            make()
        except ValueError:
            return True
        return False

    assert refused(lambda: OneStep(route)) == route.needs_direction
    assert refused(lambda: Implicit(product=route)) == (not route.second_order)
    assert refused(lambda: Unrolled(product=route)) == (not route.second_order)
    step = OneStep(route, "upper-first")
    for problem in (scalar, replace(case.problem, detach_features=False)):
        made = refused(lambda problem=problem: BilevelSolver(problem, SGD(0.1), SGD(0.1), step))
        assert made == route.per_example


def test_a_users_own_route():
    """Another way to the slopes of the losses, on top of one that there is."""

    @dataclass(frozen=True)
    class Counted(Jvp):
        calls: list = field(default_factory=list)

        def loss_slopes(self, problem, micro, lower_params, direction):
            self.calls.append(micro.size)
            return super().loss_slopes(problem, micro, lower_params, direction)

    case, counted = build("mlp"), Counted()
    ends = []
    for route in (Jvp(), counted):
        solver = BilevelSolver(case.problem, SGD(0.3), SGD(1.0), OneStep(route))
        state, _ = solver.step(
            solver.init(case.params, case.upper_params), [case.batch], case.upper_batch
        )
        ends.append(state)
    assert same_bits(*ends)
    assert counted.calls == [5]


@pytest.mark.parametrize("name", ["mlp", "encoder"])
def test_auto_takes_double_backward_where_both_derivatives_are_wanted(name):
    case = build(name)
    upper = tree.map(lambda leaf: leaf.detach().requires_grad_(), case.upper_params)
    passed = lower_pass(case.problem, Jvp(), case.params, upper, [case.batch])
    direction = random_like(case.params, 0)
    auto, reverse, jvp = (
        second_derivatives(case.problem, route, passed, case.params, upper, direction)
        for route in (Auto(), Reverse(), Jvp())
    )
    assert same_bits(auto, reverse)
    assert relative(auto, jvp) <= 1e-12


def test_the_weighted_mean_is_not_normalised():
    weights = torch.tensor([0.5, 0.0, 1.0, 0.5])
    losses = torch.tensor([4.0, 100.0, 2.0, 8.0])
    assert float(weighted_mean(weights, losses)) == 2.0
    problem = build("mlp").problem
    assert is_separable(problem)
    assert not is_separable(replace(problem, detach_features=False))
    assert not is_separable(BilevelProblem(problem.lower_loss, problem.upper_loss))
