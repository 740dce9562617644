"""The penalties' hypergradient against a dense solution, and the command."""

from __future__ import annotations

import json

import pytest
import torch
from sklearn.datasets import load_breast_cancer

import bilevel.hypergradients.implicit
import bilevel.hypergradients.unrolled
from bilevel import ConjugateGradient, Implicit, Unrolled, check_hypergradient
from recipes.options.values import OptionError
from recipes.problems.logistic_regularization import (
    START,
    RegularizationOptions,
    Rows,
    Splits,
    exact,
    hessian_products,
    judged,
    logistic_loss,
    lower_loss,
    main,
    make_solver,
    methods_of,
    one_for_all,
    read_splits,
    reference,
    search,
    solve_lower,
    upper_loss,
)
from tests.bilevel.run_window import run_window


@pytest.fixture(scope="module")
def splits() -> Splits:
    return read_splits(torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def small(splits) -> Splits:
    """Four features."""
    return Splits(*(Rows(rows.x[:, :4], rows.y) for rows in splits))


def penalties_of(splits):
    features = splits.train.x.shape[1]
    return START + torch.linspace(-1, 2, features, dtype=torch.float64)


def test_splits_hold_every_row_once_and_are_standardised(splits):
    assert [len(rows.y) for rows in splits] == [200, 150, 219]
    x = torch.as_tensor(load_breast_cancer().data)
    seen = torch.cat([rows.x for rows in splits])
    # Undo the scale by least squares on one feature: every original row is there once.
    original = ((x - x.mean(0)) / x.std(0))[:, 0].sort().values
    found = ((seen - seen.mean(0)) / seen.std(0))[:, 0].sort().values
    torch.testing.assert_close(found, original, rtol=1e-10, atol=1e-12)
    zeros, ones = torch.zeros(30).double(), torch.ones(30).double()
    torch.testing.assert_close(splits.train.x.mean(0), zeros, rtol=0, atol=1e-12)
    torch.testing.assert_close(splits.train.x.std(0), ones, rtol=1e-12, atol=0)
    assert set(torch.cat([rows.y for rows in splits]).tolist()) == {-1.0, 1.0}


def test_newton_solves_the_lower_level(splits):
    penalties = penalties_of(splits)
    w, hessian = solve_lower(penalties, splits.train)
    loss = lambda w: lower_loss(w, penalties, splits.train)  # noqa: E731
    assert float(torch.func.grad(loss)(w).norm()) < 1e-13
    torch.testing.assert_close(
        hessian, torch.func.jacrev(torch.func.grad(loss))(w), rtol=1e-10, atol=1e-14
    )


def test_exact_gradient_is_that_of_one_more_newton_step(splits):
    """Newton's step from w* has the derivative of w* itself, and autograd can take it."""
    penalties = penalties_of(splits).requires_grad_()
    w, _ = solve_lower(penalties.detach(), splits.train)
    loss = lambda w: lower_loss(w, penalties, splits.train)  # noqa: E731
    step = torch.linalg.solve(torch.func.jacrev(torch.func.grad(loss))(w), torch.func.grad(loss)(w))
    upper = upper_loss(w - step, penalties, splits.validation)
    (expected,) = torch.autograd.grad(upper, penalties)
    found, gradient, _ = exact(penalties.detach(), splits)
    torch.testing.assert_close(found, upper.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-14)


def hypergradient_at(solver, w, penalties, splits, steps=1):
    state = solver.init(w, penalties)
    return run_window(
        solver.hypergradient,
        solver.problem,
        solver.lower_optimizer,
        state.lower_params,
        state.upper_params,
        state.lower_optimizer,
        [[splits.train]] * steps,
        splits.validation,
        state.memory,
    )


def test_implicit_at_the_solution_is_exact(splits):
    penalties = penalties_of(splits)
    solver = make_solver(Implicit(ConjugateGradient(60, 1e-13)), 1, 10)
    w, _ = solve_lower(penalties, splits.train)
    result = hypergradient_at(solver, w, penalties, splits)
    loss, gradient, _ = exact(penalties, splits)
    torch.testing.assert_close(result.upper_loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.hypergradient, gradient, rtol=1e-9, atol=1e-13)


def test_unrolled_agrees_with_differences(small):
    solver = make_solver(Unrolled(), 5, 10)
    state = solver.init(torch.ones(4).double(), penalties_of(small))
    state, _ = solver.window(state, [[small.train]] * 3)
    check = check_hypergradient(
        solver,
        state,
        [[small.train]] * 5,
        small.validation,
        generator=torch.Generator().manual_seed(0),
    )
    assert check, check.message


@pytest.mark.parametrize("method", range(3))
def test_products_are_counted(small, monkeypatch, method):
    options = RegularizationOptions(lower_steps=6, truncated=3, cg_iterations=4)
    hypergradient = list(methods_of(options).values())[method]
    counted = []
    # One by one: autograd takes as many through one graph of all steps.
    for module in (bilevel.hypergradients.unrolled, bilevel.hypergradients.one_graph):
        monkeypatch.setattr(module, "is_small", lambda *given: False)
    plain = bilevel.hypergradients.unrolled.second_derivatives
    monkeypatch.setattr(
        bilevel.hypergradients.unrolled,
        "second_derivatives",
        lambda *given: counted.append(1) or plain(*given),
    )
    product_of = bilevel.hypergradients.implicit.hessian_product

    def counting(*given):
        product = product_of(*given)
        return lambda vector: counted.append(1) or product(vector)

    monkeypatch.setattr(bilevel.hypergradients.implicit, "hessian_product", counting)
    solver = make_solver(hypergradient, 6, 2)
    for _, info in search(solver, small.train, small.validation, 2):
        assert hessian_products(info, hypergradient, 6) == len(counted) > 0
        counted.clear()


def test_the_reference_is_a_stationary_minimum(splits):
    found = reference(splits)
    best, gradient, _ = exact(found, splits)
    assert float(gradient.norm()) < 1e-7
    start = torch.full_like(found, START)
    assert best < exact(start, splits)[0]
    for direction in torch.eye(30).double()[::7]:
        assert best < exact(found + 0.1 * direction, splits)[0]
        assert best < exact(found - 0.1 * direction, splits)[0]
    assert judged(found, splits, float(best))["gap"] == 0.0


def test_a_search_with_the_core_comes_near_the_reference(small):
    """Four features are solved for in a few windows; Adam's cosine ends at rate 0."""
    best = float(exact(reference(small), small)[0])
    solver = make_solver(Implicit(ConjugateGradient(4), stationarity_tolerance=None), 20, 40)
    *_, (state, _) = search(solver, small.train, small.validation, 40)
    assert 0 <= judged(state.upper_params, small, best)["gap"] < 1e-4


def test_one_for_all_is_the_best_of_its_grid(small):
    found = one_for_all(small)
    assert len(found.unique()) == 1
    loss = lambda p: float(logistic_loss(solve_lower(p, small.train)[0], small.validation))  # noqa: E731
    for value in torch.linspace(-10, 0, 41).tolist():
        assert loss(found) <= loss(torch.full_like(found, value)) + 1e-12


def test_the_command(tmp_path, capsys):
    output = tmp_path / "found.json"
    given = ["--seeds", "2", "--upper-steps", "1", "--lower-steps", "2", "--truncated", "1"]
    assert main([*given, "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert report["seeds"] == [0, 1]
    assert report["environment"]["threads"] == 1
    table = capsys.readouterr().out
    assert len(report["runs"]) == 5
    for title, runs in report["runs"].items():
        assert title in table
        assert all(run["gap"] >= 0 or title.startswith("one") for run in runs)


def test_options_that_cannot_be_used():
    with pytest.raises(OptionError, match="--truncated: expected 1 to --lower-steps; found 6"):
        RegularizationOptions(lower_steps=5, truncated=6)
    assert main(["--upper-steps", "0"]) == 2
