"""The audit holds what autograd holds, and says how far that is from the whole derivative."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd.functional import jacobian

from bilevel import (
    SGD,
    BilevelProblem,
    BilevelSolver,
    CentralDifference,
    ConjugateGradient,
    Implicit,
    Jvp,
    OneStep,
    Reverse,
    ReweightingProblem,
    Unrolled,
    check_hypergradient,
)

F64 = torch.float64
LR = 0.1
STEPS = (1e-3, 1e-4, 1e-5)


def draw(*shape, seed):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


X, Y, X_UPPER, Y_UPPER = draw(12, 3, seed=0), draw(12, seed=1), draw(8, 3, seed=2), draw(8, seed=3)
THETA, PHI = draw(3, seed=4), torch.tensor([0.5, 0.3], dtype=F64)


def errors(x, y, w):
    return (x @ w - y) ** 2


def weighting(phi, losses):
    """A Meta-Weight-Net whose feature is the loss itself."""
    return torch.sigmoid(phi[0] * losses + phi[1])


def upper_loss(theta, phi, batch):
    return errors(X_UPPER, Y_UPPER, theta["w"]).mean()


def reweighting(detach_features=True):
    return ReweightingProblem(
        lambda theta, batch: (errors(X, Y, theta["w"]),) * 2,
        lambda phi, batch, losses: weighting(phi["p"], losses),
        upper_loss,
        detach_features=detach_features,
    )


def scalar_loss(theta, phi, batch):
    """The same with a detach of the user's own."""
    losses = errors(X, Y, theta["w"])
    return (weighting(phi["p"], losses.detach()) * losses).mean()


def field(w, phi):
    """The lower gradient as a function in which everything moves."""
    residuals = X @ w - Y
    return 2 * X.T @ (weighting(phi, residuals**2) * residuals) / len(X)


def held(w, phi, features):
    residuals = X @ w - Y
    return 2 * X.T @ (weighting(phi, features) * residuals) / len(X)


def through_steps(steps):
    """Both derivatives of the upper loss after steps of SGD, everything written out."""
    features, w = [], THETA
    for _ in range(steps):
        features.append(errors(X, Y, w))
        w = w - LR * field(w, PHI)

    def stopped(phi):
        w = THETA
        for one in features:
            w = w - LR * held(w, phi, one)
        return errors(X_UPPER, Y_UPPER, w).mean()

    def whole(phi):
        w = THETA
        for _ in range(steps):
            w = w - LR * field(w, phi)
        return errors(X_UPPER, Y_UPPER, w).mean()

    return jacobian(stopped, PHI), jacobian(whole, PHI)


def at_solution():
    """Both derivatives at the solution of field(w, φ) = 0, by the implicit function theorem."""
    w = THETA
    for _ in range(200):
        w = w - torch.linalg.solve(jacobian(field, (w, PHI))[0], field(w, PHI))
    v = jacobian(lambda w: errors(X_UPPER, Y_UPPER, w).mean(), w)
    features = errors(X, Y, w)
    answers = []
    for function in (lambda w, phi: held(w, phi, features), field):
        in_w, in_phi = jacobian(function, (w, PHI))
        answers.append(-in_phi.T @ torch.linalg.solve(in_w.T, v))
    return w, *answers


def audit(problem, method, steps, theta=THETA, lr=LR, differences=STEPS, **options):
    solver = BilevelSolver(problem, SGD(lr), SGD(1.0), method, unroll_steps=steps)
    batches = [[None]] * steps if steps > 1 else [None]
    generator = torch.Generator().manual_seed(0)
    return check_hypergradient(
        solver,
        solver.init({"w": theta}, {"p": PHI}),
        batches,
        0,
        directions=2,
        steps=differences,
        generator=generator,
        **options,
    )


def distance(stopped, whole):
    """What the audit measures of two hypergradients, along its own directions."""
    generator = torch.Generator().manual_seed(0)
    along = torch.stack([torch.randn(2, dtype=F64, generator=generator) for _ in range(2)])
    lengths = float((along @ stopped).norm()), float((along @ whole).norm())
    return float((along @ (stopped - whole)).norm()) / max(lengths)


PROBLEMS = [reweighting(), BilevelProblem(scalar_loss, upper_loss)]
PRODUCTS = [Unrolled(), Unrolled(product=Jvp()), Unrolled(product=Reverse())]


@pytest.mark.parametrize("problem", PROBLEMS, ids=["per example", "scalar"])
@pytest.mark.parametrize("steps", [2, 4])
def test_unrolled_agrees_with_constants_held_and_the_rest_is_reported(problem, steps):
    stopped, whole = through_steps(steps)
    for method in PRODUCTS:
        check = audit(problem, method, steps)
        assert check.outcome == "agrees"
        assert check.relative_error <= 1e-8
        assert check.stop_gradient_error == pytest.approx(distance(stopped, whole), rel=1e-3)
        assert check.stop_gradient_error > 0.005
        assert "ReweightingProblem(detach_features=False)" in str(check)
    by_differences = audit(problem, Unrolled(product=CentralDifference()), steps)
    assert by_differences
    assert by_differences.stop_gradient_error == pytest.approx(distance(stopped, whole), rel=1e-3)


@pytest.mark.parametrize("problem", PROBLEMS, ids=["per example", "scalar"])
def test_implicit_agrees_with_constants_held_and_the_rest_is_reported(problem):
    w, stopped, whole = at_solution()
    for product in (Jvp(), CentralDifference()):
        method = Implicit(ConjugateGradient(50, 1e-12), product=product)
        check = audit(problem, method, 1, theta=w, lr=0.6, differences=(1e-3,), solve_steps=60)
        assert check.outcome == "agrees"
        assert check.relative_error <= 1e-5
        assert check.stop_gradient_error == pytest.approx(distance(stopped, whole), rel=1e-2)
        assert check.stop_gradient_error > 0.1


def test_attached_features_leave_nothing_to_report():
    """Through several steps, and at the solution of what is then another lower problem."""
    problem = reweighting(detach_features=False)
    check = audit(problem, Unrolled(), 4)
    assert check
    assert check.stop_gradient_error is None
    assert "detach_features" not in str(check)
    solved = audit(
        problem,
        Implicit(ConjugateGradient(50, 1e-12)),
        1,
        lr=0.5,
        differences=(1e-4,),
        solve_steps=200,
    )
    assert solved
    assert solved.stop_gradient_error is None


@pytest.mark.parametrize("route", [Jvp(), Reverse(), CentralDifference()], ids=str)
def test_one_step_has_nothing_to_report_since_its_constants_stand_still(route):
    for problem in PROBLEMS:
        check = audit(problem, OneStep(route), 1)
        assert check
        assert check.stop_gradient_error is None


def test_constants_of_the_upper_loss_are_held_too():
    """A distillation target from θ itself: its derivative counts as none."""

    def distilled(theta, phi, batch):
        z = X_UPPER @ theta["w"]
        return ((z - torch.tanh(z).detach()) ** 2).mean()

    problem = BilevelProblem(scalar_loss, distilled)
    check = audit(problem, OneStep(Jvp()), 1)
    assert check
    w, phi = THETA, PHI.clone().requires_grad_()
    z = X_UPPER @ (w - LR * field(w, phi))
    stopped, whole = (
        torch.autograd.grad(((z - y) ** 2).mean(), phi, retain_graph=True)[0]
        for y in (torch.tanh(z).detach(), torch.tanh(z))
    )
    assert check.stop_gradient_error == pytest.approx(distance(stopped, whole), rel=1e-3)


def test_a_detach_of_phi_is_still_a_fault():
    problem = ReweightingProblem(
        lambda theta, batch: (errors(X, Y, theta["w"]), None),
        lambda phi, batch, features: weighting(phi["p"].detach(), X[:, 0]) + 0 * phi["p"].sum(),
        upper_loss,
    )
    check = audit(problem, OneStep(), 1)
    assert check.outcome == "disagrees"
    assert not math.isfinite(check.relative_error) or check.relative_error > 0.5
