"""Problems without per-example structure: φ anywhere in the lower loss, features not detached."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from bilevel import (
    SGD,
    Adam,
    Auto,
    BilevelProblem,
    CentralDifference,
    Jvp,
    OneStep,
    Reverse,
    tree,
)
from tests.bilevel.comparing import relative
from tests.bilevel.problems import below_the_network, weights_from_losses
from tests.bilevel.run_case import assert_matches_differences, run_case_step, warm
from tests.bilevel.run_window import run_step
from tests.bilevel.zoo import Encoder, Language, build, make, tokens, vectors
from tests.oracles import random_like, slope, upper_after_step

ROUTES = [Auto(), Jvp(), CentralDifference()]


@pytest.mark.parametrize("order", ["lower-first", "upper-first"])
@pytest.mark.parametrize("module", [Encoder, Language])
def test_features_that_are_not_detached(module, order):
    torch.manual_seed(3)
    case = make(module(), tokens, weights=weights_from_losses)
    case = replace(case, problem=replace(case.problem, detach_features=False))
    optimizer = Adam(0.05, (0.8, 0.9), 1e-3)
    reverse = run_case_step(case, optimizer, OneStep(Reverse(), order))
    if order == "lower-first":
        assert_matches_differences(case, optimizer, reverse.hypergradient)
    detached = replace(case, problem=replace(case.problem, detach_features=True))
    other = run_case_step(detached, optimizer, OneStep(Reverse(), order))
    assert relative(other.hypergradient, reverse.hypergradient) > 1e-3
    assert relative(other.passed.grads, reverse.passed.grads) > 1e-3
    for route in ROUTES:
        found = run_case_step(case, optimizer, OneStep(route, order))
        limit = 1e-6 if isinstance(route, CentralDifference) else 1e-10
        assert relative(found.hypergradient, reverse.hypergradient) <= limit, route
        assert relative(found.passed.grads, reverse.passed.grads) <= 1e-12


def test_a_net_on_detached_features_by_every_route():
    torch.manual_seed(3)
    case = make(Encoder(), tokens, weights=weights_from_losses)
    case = replace(case, problem=replace(case.problem, rows=build("encoder").problem.rows))
    optimizer = Adam(0.05, (0.8, 0.9), 1e-3)
    reverse = run_case_step(case, optimizer, OneStep(Reverse()))
    for route in ROUTES:
        result = run_case_step(case, optimizer, OneStep(route))
        limit = 1e-6 if isinstance(route, CentralDifference) else 1e-10
        assert result.passed.micro_batches[0].note is None
        assert relative(result.hypergradient, reverse.hypergradient) <= limit, route


@pytest.mark.parametrize("optimizer", [SGD(0.3, 0.8), Adam(0.05, (0.8, 0.9), 1e-3)], ids=str)
def test_upper_parameters_below_layer_norm_and_attention(optimizer):
    """Where reverse over forward would be wrong."""
    case = below_the_network()
    reverse = run_case_step(case, optimizer, OneStep(Reverse())).hypergradient
    assert_matches_differences(case, optimizer, reverse)
    for route in ROUTES:
        found = run_case_step(case, optimizer, OneStep(route)).hypergradient
        limit = 1e-6 if isinstance(route, CentralDifference) else 1e-10
        assert relative(found, reverse) <= limit, route


def test_scalar_losses_are_weighted_by_batch_size():
    case, optimizer = below_the_network(), SGD(0.3)

    def part(rows):
        inputs = {"tokens": case.batch["inputs"]["tokens"][rows]}
        return {"inputs": inputs, "labels": case.batch["labels"][rows]}

    case = replace(case, problem=replace(case.problem, batch_size=None))
    params, state = warm(case, optimizer)
    for sizes, given in (((3 / 5, 2 / 5), lambda b: len(b["labels"])), ((0.5, 0.5), None)):
        problem = replace(case.problem, batch_size=given)
        torch.manual_seed(11)
        result = run_step(
            OneStep(Jvp()),
            problem,
            optimizer,
            params,
            case.upper_params,
            state,
            [part([0, 1, 2]), part([3, 4])],
            case.upper_batch,
        )
        assert result.passed.shares == list(sizes)
        random = torch.Generator().manual_seed(11).get_state()

        class Mean:
            def lower_loss(lower, upper, batch, problem=problem, sizes=sizes):
                first = problem.lower_loss(lower, upper, part([0, 1, 2]))
                return sizes[0] * first + sizes[1] * problem.lower_loss(lower, upper, part([3, 4]))

            upper_loss = case.problem.upper_loss

        function = upper_after_step(
            Mean, optimizer, params, state, None, case.upper_batch, random, None
        )
        direction = random_like(case.upper_params, 0)
        expected = slope(function, case.upper_params, direction)
        found = float(tree.vdot(result.hypergradient, direction))
        assert abs(found - expected) <= 1e-6 * abs(expected)


def test_operations_without_forward_mode_are_named_with_advice():
    class NoForwardMode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx, b):
            return b * ctx.saved_tensors[0].cos()

    problem = BilevelProblem(
        lambda lower, upper, batch: (NoForwardMode.apply(lower) * upper).sum(),
        lambda lower, upper, batch: lower.square().sum(),
    )
    params, upper = torch.ones(3).double(), torch.ones(3).double()
    arguments = (problem, SGD(0.1), params, upper, SGD(0.1).init(params), [None], 0)
    with pytest.raises(RuntimeError, match=r"CentralDifference\(\)"):
        run_step(OneStep(Jvp()), *arguments)
    with pytest.warns(UserWarning, match="custom autograd.Function"):
        found = run_step(OneStep(CentralDifference()), *arguments).hypergradient
    step = params - 0.1 * upper * params.cos()
    expected = 2 * step * -0.1 * params.cos()
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)


def test_no_influence_of_the_lower_parameters_leaves_the_direct_term():
    case = build("mlp")
    problem = replace(
        case.problem, upper_loss=lambda lower, upper, batch: upper["table"].square().sum()
    )
    for route in (Auto(), Jvp(), CentralDifference(), Reverse()):
        result = run_step(
            OneStep(route),
            problem,
            SGD(0.1),
            case.params,
            case.upper_params,
            SGD(0.1).init(case.params),
            [case.batch],
            case.upper_batch,
        )
        expected = 2 * case.upper_params["table"]
        torch.testing.assert_close(result.hypergradient["table"], expected, rtol=1e-12, atol=1e-15)


def test_the_size_of_the_difference_step():
    case = make(nn.Linear(4, 3), lambda size: {"input": vectors(size)["x"]})
    optimizer = SGD(0.3)
    reverse = run_case_step(case, optimizer, OneStep(Reverse())).hypergradient
    errors = [
        relative(
            run_case_step(case, optimizer, OneStep(CentralDifference(step))).hypergradient, reverse
        )
        for step in (0.2, 0.02)
    ]
    assert 90 < errors[0] / errors[1] < 110  # second order
    with pytest.raises(ValueError, match="relative_step"):
        CentralDifference(0.0)
