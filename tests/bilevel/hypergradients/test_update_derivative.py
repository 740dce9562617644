"""How far the conventions of the literature are from the exact derivative of the step."""

from __future__ import annotations

import math

import pytest
import torch

from bilevel import (
    SGD,
    Adagrad,
    Adam,
    AdamW,
    BilevelProblem,
    BilevelSolver,
    CentralDifference,
    Exact,
    Identity,
    Jvp,
    OneStep,
    RMSProp,
    Sama,
    tree,
)
from bilevel.optimizers.base import OptimizerState
from tests.bilevel.comparing import relative
from tests.bilevel.quadratic import Quadratic
from tests.bilevel.run_window import run_step
from tests.bilevel.zoo import build

F64 = torch.float64
LR = 0.05


def one_step(quadratic, optimizer, method, state=None):
    state = optimizer.init(quadratic.w) if state is None else state
    return run_step(
        method, quadratic.problem, optimizer, quadratic.w, quadratic.x, state, [None], 0
    ).hypergradient


def test_closed_forms_of_one_sgd_step():
    """Exact: H x − lr C v. Identity, and Sama for SGD: H x − C v. Implicit: H x − C A⁻¹ v."""
    quadratic = Quadratic()
    direct, v = quadratic.H @ quadratic.x, quadratic.v(quadratic.step(LR))
    for convention, expected in (
        (Exact(), direct - LR * quadratic.C @ v),
        (Identity(), direct - quadratic.C @ v),
        (Sama(), direct - quadratic.C @ v),
    ):
        for route in (Jvp(), CentralDifference(), CentralDifference(radius=0.01)):
            method = OneStep(route, update_derivative=convention)
            found = one_step(quadratic, SGD(LR), method)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
        # Momentum from rest and a clip do not change what the conventions ignore.
        clipped = SGD(LR, max_norm=0.5)
        found = one_step(quadratic, clipped, OneStep(Jvp(), update_derivative=convention))
        grad = quadratic.gradient(quadratic.w)
        scale = 0.5 / (float(grad.norm()) + 1e-6)
        v_clipped = quadratic.v(quadratic.w - LR * scale * grad)
        gain = LR * scale if convention == Exact() else 1.0
        expected = direct - gain * quadratic.C @ v_clipped
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_upper_first():
    quadratic = Quadratic()
    direct, v = quadratic.H @ quadratic.x, quadratic.v(quadratic.w)
    for convention, gain in ((Exact(), LR), (Identity(), 1.0)):
        method = OneStep(Jvp(), "upper-first", update_derivative=convention)
        found = one_step(quadratic, SGD(LR), method)
        torch.testing.assert_close(found, direct - gain * quadratic.C @ v, rtol=1e-12, atol=1e-13)


def test_the_direct_part_is_drowned_by_a_factor_of_the_learning_rate():
    """Without one the identity has the exact direction; with one it does not."""
    quadratic = Quadratic()
    both = {
        name: one_step(quadratic, SGD(LR), OneStep(Jvp(), update_derivative=convention))
        for name, convention in (("exact", Exact()), ("identity", Identity()))
    }
    direct = quadratic.H @ quadratic.x
    torch.testing.assert_close(
        both["exact"] - direct, LR * (both["identity"] - direct), rtol=1e-10, atol=1e-13
    )
    cosine = torch.cosine_similarity(both["exact"], both["identity"], dim=0)
    assert float(cosine) < 0.9


def test_identity_and_exact_against_the_implicit_gradient():
    """At the lower solution, without direct part: C v against C A⁻¹ v, whatever lr is.

    They agree only as far as A is a multiple of the identity.
    """
    for spread, least, most in ((1.0, 1.0 - 1e-12, 1.0 + 1e-12), (30.0, 0.0, 0.98)):
        quadratic = Quadratic(spread=spread, direct=False)
        solution = quadratic.solution()
        at = quadratic.at(solution)
        implicit = quadratic.implicit()
        for convention in (Exact(), Identity()):
            found = one_step(at, SGD(LR), OneStep(Jvp(), update_derivative=convention))
            cosine = float(torch.cosine_similarity(found, implicit, dim=0))
            assert least <= cosine <= most


def betty_darts(quadratic, w, v, radius=0.01):
    """Betty's darts.py in float64: in-place shifts, identity, no learning rate."""
    w, eps = w.clone(), radius / (float(v.norm()) + 1e-15)
    gradient = lambda w: quadratic.C @ w  # noqa: E731  (∂L_lower/∂x)
    w += eps * v
    ahead = gradient(w)
    w -= 2 * eps * v
    behind = gradient(w)
    return (behind - ahead) / (2 * eps)


def test_betty_s_setting_is_reproduced():
    quadratic = Quadratic(direct=False)
    method = OneStep(CentralDifference(radius=0.01), update_derivative=Identity())
    found = one_step(quadratic, SGD(LR), method)
    v = quadratic.v(quadratic.step(LR))
    expected = betty_darts(quadratic, quadratic.w, v)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def betty_precondition(optimizer, grads, state, v):
    """Betty's precondition_adam, from what torch.optim.Adam holds after the step."""
    beta1, beta2 = optimizer.betas
    exp_avg = beta1 * state.first_moment + (1 - beta1) * grads
    exp_avg_sq = beta2 * state.second_moment + (1 - beta2) * grads**2
    exp_avg_old = (exp_avg - (1 - beta1) * grads) / beta1
    exp_avg_sq_old = (exp_avg_sq - (1 - beta2) * grads * grads) / beta2
    scale = (1 - beta1) * beta2 * exp_avg_sq_old - beta1 * (1 - beta2) * grads * exp_avg_old
    scale = scale / (torch.sqrt(exp_avg_sq) + optimizer.eps) ** 3
    return v * scale * optimizer.lr


def warm_state(steps):
    generator = torch.Generator().manual_seed(steps)
    m, s, g, v = torch.randn(4, 50, dtype=F64, generator=generator)
    return OptimizerState(torch.tensor(steps), m, m.square() + s.square() + 0.1), g, v


@pytest.mark.parametrize("optimizer", [Adam(0.01), AdamW(0.01, (0.8, 0.95), 1e-4)], ids=str)
@pytest.mark.parametrize("steps", [1, 9, 99])
def test_sama_is_betty_s_factor(optimizer, steps):
    state, grads, v = warm_state(steps)
    found = Sama().pull_back(optimizer, grads, state, torch.zeros_like(grads), v)
    expected = -betty_precondition(optimizer, grads, state, v)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("taken", "excess"), [(1, 4.25), (9, 6.53), (99, 3.24), (999, 1.258)])
def test_sama_has_adam_s_direction_but_not_its_size(taken, excess):
    """c₁/√c₂ times the exact factor at every entry, up to eps."""
    optimizer = Adam(0.01, eps=1e-14)
    state, grads, v = warm_state(taken)
    params = torch.zeros_like(grads)
    sama = Sama().pull_back(optimizer, grads, state, params, v)
    exact = Exact().pull_back(optimizer, grads, state, params, v)
    c1, c2 = (1.0 - beta ** (taken + 1) for beta in optimizer.betas)
    assert c1 / math.sqrt(c2) == pytest.approx(excess, rel=2e-3)
    torch.testing.assert_close(sama, exact * c1 / math.sqrt(c2), rtol=1e-9, atol=1e-14)


def test_l2_decay_enters_sama_s_gradient():
    optimizer = Adam(0.01, weight_decay=0.3, max_norm=0.5)
    state, grads, v = warm_state(9)
    params = torch.linspace(-1.0, 1.0, 50, dtype=F64)
    found = Sama().pull_back(optimizer, grads, state, params, v)
    seen = grads * (0.5 / (grads.norm() + 1e-6)) + 0.3 * params
    expected = -betty_precondition(optimizer, seen, state, v)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


def test_adam_s_identity_has_another_direction():
    """Where the gradients' sizes differ by orders of magnitude."""
    optimizer = Adam(0.01)
    state, grads, v = warm_state(99)
    size = torch.logspace(-3, 0, 50, dtype=F64)
    state = state._replace(
        first_moment=0.1 * state.first_moment * size, second_moment=state.second_moment * size**2
    )
    params = torch.zeros_like(grads)
    exact = Exact().pull_back(optimizer, 0.1 * grads * size, state, params, v)
    identity = Identity().pull_back(optimizer, 0.1 * grads * size, state, params, v)
    sama = Sama().pull_back(optimizer, 0.1 * grads * size, state, params, v)
    assert float(torch.cosine_similarity(sama, exact, dim=0)) > 1.0 - 1e-9
    assert float(torch.cosine_similarity(identity, exact, dim=0)) < 0.7


def test_zero_gradients_and_frozen_leaves():
    optimizer = Adam(0.01)
    params = {name: torch.ones(3, dtype=F64) for name in "abc"}
    grads = {"a": torch.zeros(3, dtype=F64), "b": torch.ones(3, dtype=F64), "c": None}
    v = {"a": torch.ones(3, dtype=F64), "b": None, "c": torch.ones(3, dtype=F64)}
    for convention in (Exact(), Identity(), Sama()):
        found = convention.pull_back(optimizer, grads, optimizer.init(params), params, v)
        assert bool(tree.allfinite(found))
        assert found["c"] is None
    floats = tree.map(torch.Tensor.float, (grads, params, v))
    found = Sama().pull_back(optimizer, floats[0], optimizer.init(floats[1]), *floats[1:])
    assert bool(tree.allfinite(found))


def test_through_a_network_the_conventions_are_the_exact_route_with_another_direction():
    """The mixed product is linear in μ: with SGD, identity is 1/lr times the exact part."""
    case = build("mlp")
    optimizer = SGD(LR)
    found = {}
    for convention in (Exact(), Identity()):
        found[convention] = run_step(
            OneStep(Jvp(), update_derivative=convention),
            case.problem,
            optimizer,
            case.params,
            case.upper_params,
            optimizer.init(case.params),
            [case.batch],
            case.upper_batch,
        )
    direct = found[Exact()].upper.direct
    exact, identity = (
        tree.axpy(-1.0, direct, found[key].hypergradient) for key in (Exact(), Identity())
    )
    assert relative(tree.scale(LR, identity), exact) <= 1e-12


def test_what_does_not_apply_is_refused():
    problem = BilevelProblem(lambda lower, upper, batch: lower, lambda lower, upper, batch: lower)
    sama = OneStep(update_derivative=Sama())
    for optimizer in (RMSProp(0.1), Adagrad(0.1)):
        with pytest.raises(ValueError, match=r"Sama: defined for Adam.*Exact\(\)"):
            BilevelSolver(problem, optimizer, SGD(0.1), sama)
    with pytest.raises(ValueError, match=r"Sama\(\) looks at the gradient.*lower-first"):
        OneStep(order="upper-first", update_derivative=Sama())
    with pytest.raises(ValueError, match="needs the gradient of the lower step"):
        Sama().pull_back(Adam(0.1), None, None, None, None)
