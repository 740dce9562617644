"""One-step hypergradients known in closed form or computed elsewhere by complex steps."""

from __future__ import annotations

import pytest
import torch

from bilevel import (
    SGD,
    Adam,
    Auto,
    BilevelProblem,
    CentralDifference,
    Ghost,
    Jvp,
    OneStep,
    PerExample,
    Reverse,
    ReweightingProblem,
    tree,
)
from bilevel.autodiff.gradient import upper_gradient
from tests.bilevel.problems import total_problem
from tests.bilevel.run_window import run_step
from tests.bilevel.zoo import CASES, build
from tests.oracles import REGRESSION, VALIDATION, WEIGHTS, half_squares, per_example_gradients

EXACT = [Jvp(), Reverse()]


def mean_problem() -> ReweightingProblem:
    """The same without ridge, as a mean over the 4 examples: a quarter of the gradient."""
    return ReweightingProblem(
        lambda lower, batch: (half_squares(lower, batch), None),
        lambda upper, batch, features: upper["s"],
        lambda lower, upper, batch: half_squares(lower, batch).sum(),
    )


def one_step(problem, optimizer, start, route):
    params = {"w": torch.tensor(start, dtype=torch.float64)}
    arguments = (problem, optimizer, params, {"s": WEIGHTS}, optimizer.init(params))
    return run_step(OneStep(route), *arguments, [REGRESSION], VALIDATION)


@pytest.mark.parametrize("route", [Auto(), PerExample(), *EXACT, CentralDifference()])
def test_one_gradient_descent_step(route):
    for problem, lr in ((total_problem(0.0), 0.1), (mean_problem(), 0.4)):
        if isinstance(route, PerExample) and isinstance(problem, BilevelProblem):
            continue
        found = one_step(problem, SGD(lr), [0.0, 0.0], route).hypergradient["s"]
        expected = torch.tensor([0.0, 1.0675, 1.785, 7.5075], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("route", EXACT)
def test_one_adam_step(route):
    """Sign-like: the hypergradient is nearly nothing, and still right to its last digit."""
    result = one_step(total_problem(0.5), Adam(0.1), [0.3, -0.2], route)
    assert abs(float(result.upper.loss) - 1.992500000860) < 1e-12
    expected = torch.tensor([2.58e-11, -1.01e-10, -1.52e-10, -5.42e-10], dtype=torch.float64)
    torch.testing.assert_close(result.hypergradient["s"], expected, rtol=5e-3, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_one_gradient_descent_step_is_minus_lr_times_an_inner_product(name):
    """dL_upper/dw_i = −(lr/batch) ⟨∇ℓ_i(θ), ∇L_upper(θ')⟩, for any model."""
    case, lr = build(name), 0.3
    random = torch.get_rng_state()
    result = run_step(
        OneStep(),
        case.problem,
        SGD(lr),
        case.params,
        case.upper_params,
        SGD(lr).init(case.params),
        [case.batch],
        case.upper_batch,
    )
    examples = per_example_gradients(case.problem, case.params, case.batch, random)
    torch.set_rng_state(random)
    v = upper_gradient(case.problem, result.lower_params, case.upper_params, case.upper_batch).lower
    products = torch.stack([tree.vdot(g, v) for g in examples])
    table, scale = case.upper_params["table"], case.upper_params["scale"]
    expected = -lr / len(examples) * scale * products + 0.02 * table
    torch.testing.assert_close(result.hypergradient["table"], expected, rtol=1e-10, atol=1e-14)


def test_duplicates_share_and_permutations_carry_over():
    doubled = {key: value[[0, 1, 2, 3, 3, 1]] for key, value in REGRESSION.items()}
    s = WEIGHTS[[0, 1, 2, 3, 3, 1]]
    params = {"w": torch.tensor([0.3, -0.2], dtype=torch.float64)}

    def hypergradient(order):
        batch = {key: value[order] for key, value in doubled.items()}
        step = run_step(
            OneStep(Ghost(), "upper-first"),
            mean_problem(),
            SGD(0.4),
            params,
            {"s": s[order]},
            SGD(0.4).init(params),
            [batch],
            VALIDATION,
        )
        return step.hypergradient["s"]

    found = hypergradient([0, 1, 2, 3, 4, 5])
    torch.testing.assert_close(found[[3, 1]], found[[4, 5]], rtol=1e-14, atol=0)
    order = [4, 2, 0, 5, 3, 1]
    torch.testing.assert_close(hypergradient(order), found[order], rtol=1e-13, atol=1e-15)
