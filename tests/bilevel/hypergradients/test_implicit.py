"""The implicit hypergradient against closed forms, solved problems, unrolling, and bad places."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bilevel import (
    SGD,
    Adam,
    AdamW,
    BilevelProblem,
    BilevelSolver,
    CentralDifference,
    ConjugateGradient,
    Dense,
    Implicit,
    Jvp,
    Neumann,
    Nystrom,
    OneStep,
    PerExample,
    Reverse,
    ReweightingProblem,
    StationarityWarning,
    Unrolled,
    tree,
)
from tests.bilevel.comparing import relative
from tests.bilevel.run_window import run_window
from tests.bilevel.variants import pick
from tests.bilevel.zoo import build
from tests.oracles import REGRESSION, VALIDATION, WEIGHTS, half_squares, random_like, slope

PRODUCTS = [Jvp(), Reverse(), CentralDifference()]
STILL = SGD(0.0)


def vector(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def differentiate(implicit, problem, params, upper, batches=(None,), upper_batch=0, memory=None):
    """The result at these very parameters: a lower step of length 0."""
    return run_window(
        implicit,
        problem,
        STILL,
        params,
        upper,
        STILL.init(params),
        [list(batches)],
        upper_batch,
        memory,
    )


def limit_of(implicit, exact=1e-9) -> float:
    return 1e-6 if isinstance(implicit.product, CentralDifference) else exact


# A. Quadratic: L = ½ w'Aw + x'Cw + a'w, F = ½ w'Qw + f'w + ½ x'Hx, in two tensors each.

BASIS = torch.linalg.qr(vector(4, 4)).Q
A = BASIS @ torch.diag(torch.tensor([1.0, 1.2, 1.5, 2.0], dtype=torch.float64)) @ BASIS.T
Q, C = vector(4, 4, seed=1) + vector(4, 4, seed=1).T, vector(3, 4, seed=2)
H = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
a, f = vector(4, seed=3), vector(4, seed=4)


def quadratic(matrix=A):
    def join(lower):
        return torch.cat([lower["part"][0].reshape(1), lower["part"][1].reshape(-1)])

    def lower_loss(lower, upper, batch):
        w = join(lower)
        return 0.5 * w @ matrix @ w + upper["x"] @ C @ w + a @ w

    def upper_loss(lower, upper, batch):
        w, x = join(lower), upper["x"]
        return 0.5 * w @ Q @ w + f @ w + 0.5 * x @ H @ x

    return BilevelProblem(lower_loss, upper_loss)


def quadratic_solution(x: Tensor, matrix=A) -> dict:
    w = -torch.linalg.solve(matrix, C.T @ x + a)
    return {"part": (w[0], w[1:].reshape(3, 1))}


def quadratic_hypergradient(x: Tensor, inverse: Tensor) -> Tensor:
    w = -torch.linalg.solve(A, C.T @ x + a)
    return H @ x - C @ inverse @ (Q @ w + f)


INVERSE = torch.linalg.inv(A)
X = vector(3, seed=5)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(
    "solver", [ConjugateGradient(8, 1e-13), Neumann(45), Dense(), Nystrom(4, 1e-10)]
)
def test_quadratic_with_a_cross_term(solver, product):
    """Four solvers in their limits are one answer, H x − C A⁻¹ (Q w* + f)."""
    implicit = Implicit(solver, product=product)
    found = differentiate(implicit, quadratic(), quadratic_solution(X), {"x": X})
    expected = quadratic_hypergradient(X, INVERSE)
    assert relative(found.hypergradient["x"], expected) <= limit_of(implicit)
    assert found.notes == () or isinstance(product, CentralDifference)
    assert float(found.figures["residual"]) <= limit_of(implicit, 1e-9)
    assert float(found.figures["stationarity"]) <= 1e-14


@pytest.mark.parametrize("damping", [0.1, 3.0])
def test_damping_shifts_the_hessian(damping):
    expected = quadratic_hypergradient(
        X, torch.linalg.inv(A + damping * torch.eye(4, dtype=torch.float64))
    )
    for solver in (
        ConjugateGradient(8, 1e-13, damping),
        Neumann(45, damping=damping),
        Dense(damping),
        Nystrom(4, damping),
    ):
        found = differentiate(Implicit(solver), quadratic(), quadratic_solution(X), {"x": X})
        assert relative(found.hypergradient["x"], expected) <= 1e-9


# B. Ridge regression with one strength, and with one per feature.


def ridge_problem(strength):
    def lower_loss(lower, upper, batch):
        data = half_squares(lower, batch).sum()
        return data + 0.5 * (strength(upper) * lower["w"].square()).sum()

    return BilevelProblem(lower_loss, lambda lower, upper, batch: half_squares(lower, batch).sum())


def ridge_solution(penalty: Tensor, weights: Tensor = torch.ones(4)) -> tuple[Tensor, Tensor]:  # noqa: B008
    """w*, and H⁻¹ v."""
    x, y = REGRESSION["x"], REGRESSION["y"]
    weights = weights.to(x)
    hessian = x.T @ (weights[:, None] * x) + torch.diag(penalty)
    w = torch.linalg.solve(hessian, x.T @ (weights * y))
    v = VALIDATION["x"].T @ (VALIDATION["x"] @ w - VALIDATION["y"])
    return w, torch.linalg.solve(hessian, v)


@pytest.mark.parametrize("product", PRODUCTS)
def test_ridge_strength(product):
    """dF/dλ = −v'(X'X + λ I)⁻¹ w*; with λ_j = exp(x_j): −exp(x_j) w_j [H⁻¹ v]_j."""
    implicit = Implicit(ConjugateGradient(8, 1e-13), product=product)
    strength = torch.tensor(0.7, dtype=torch.float64)
    w, q = ridge_solution(strength.expand(2))
    problem = ridge_problem(lambda upper: upper["lam"])
    upper = {"lam": strength}
    found = differentiate(implicit, problem, {"w": w}, upper, [REGRESSION], VALIDATION)
    assert relative(found.hypergradient["lam"], -(q @ w)) <= limit_of(implicit)
    logs = torch.tensor([-0.4, 0.9], dtype=torch.float64)
    w, q = ridge_solution(logs.exp())
    problem = ridge_problem(lambda upper: upper["logs"].exp())
    found = differentiate(implicit, problem, {"w": w}, {"logs": logs}, [REGRESSION], VALIDATION)
    assert relative(found.hypergradient["logs"], -logs.exp() * w * q) <= limit_of(implicit)


# C. Instance weights: the influence function.


def weighted_problem() -> BilevelProblem:
    def lower_loss(lower, upper, batch):
        ridge = 0.5 * upper["lam"] * lower["w"].square().sum()
        return (upper["s"][batch["index"]] * half_squares(lower, batch)).sum() + ridge

    return BilevelProblem(lower_loss, lambda lower, upper, batch: half_squares(lower, batch).sum())


UPPER = {"s": WEIGHTS, "lam": torch.tensor(0.5, dtype=torch.float64)}
INDEXED = {**REGRESSION, "index": torch.arange(4)}


@pytest.mark.parametrize("product", PRODUCTS)
def test_golden_numbers_of_instance_weights(product):
    """Complex-step values; scaling all weights and the ridge together changes nothing."""
    w, q = ridge_solution(UPPER["lam"].expand(2), WEIGHTS)
    implicit = Implicit(ConjugateGradient(8, 1e-13), product=product)
    found = differentiate(implicit, weighted_problem(), {"w": w}, UPPER, [INDEXED], VALIDATION)
    assert abs(float(found.upper_loss) - 0.012469135802) <= 1e-12
    expected = {
        "s": torch.tensor(
            [0.001514403292, 0.001331504344, 0.006598994056, -0.023176954733], dtype=torch.float64
        ),
        "lam": torch.tensor(0.015597622314, dtype=torch.float64),
    }
    assert relative(found.hypergradient, expected) <= limit_of(implicit)
    residuals = REGRESSION["x"] @ w - REGRESSION["y"]
    influence = -residuals * (REGRESSION["x"] @ q)
    assert relative(found.hypergradient["s"], influence) <= limit_of(implicit, 1e-12)
    balance = (WEIGHTS * found.hypergradient["s"]).sum() + 0.5 * found.hypergradient["lam"]
    assert abs(float(balance)) <= 1e-12 if not isinstance(product, CentralDifference) else 1e-8


def test_duplicates_share_and_permutations_carry_over():
    doubled = {key: value[[0, 1, 2, 3, 3, 1]] for key, value in REGRESSION.items()}
    s = WEIGHTS[[0, 1, 2, 3, 3, 1]]
    x, y = doubled["x"], doubled["y"]
    hessian = x.T @ (s[:, None] * x) + 0.5 * torch.eye(2, dtype=torch.float64)
    params = {"w": torch.linalg.solve(hessian, x.T @ (s * y))}

    def hypergradient(order):
        batch = {key: value[order] for key, value in doubled.items()}
        upper = {**UPPER, "s": s[order]}
        indexed = {**batch, "index": torch.arange(6)}
        implicit = Implicit(ConjugateGradient(8, 1e-14))
        found = differentiate(
            implicit, weighted_problem(), params, upper, [indexed], VALIDATION
        ).hypergradient
        return found["s"]

    found = hypergradient([0, 1, 2, 3, 4, 5])
    torch.testing.assert_close(found[[3, 1]], found[[4, 5]], rtol=1e-14, atol=0)
    order = [4, 2, 0, 5, 3, 1]
    torch.testing.assert_close(hypergradient(order), found[order], rtol=1e-11, atol=1e-15)


# Problems without a closed form, solved by Newton's method and differenced.


def newton(problem, params, upper, batch, steps=30):
    """Solve the lower level in float64; the test's own second derivatives."""
    flat, joined = flattened(params)
    for _ in range(steps):
        loss = lambda point: problem.lower_loss(joined(point), upper, batch)  # noqa: E731
        step = torch.linalg.solve(hessian_of(loss, flat), torch.func.grad(loss)(flat))
        flat = flat - step
        if float(step.norm()) <= 1e-11 * float(flat.norm()):
            break
    return joined(flat)


def flattened(params):
    """All parameters in one vector, and how to take it apart."""
    sizes = [leaf.numel() for leaf in params.values()]

    def joined(flat):
        pieces = zip(params, params.values(), flat.split(sizes), strict=True)
        return {name: piece.view(like.shape) for name, like, piece in pieces}

    return torch.cat([leaf.detach().reshape(-1) for leaf in params.values()]), joined


def hessian_of(loss, flat) -> Tensor:
    """Row by row, by double backward: torch.func.hessian is wrong for layer_norm's scale."""
    return torch.autograd.functional.hessian(loss, flat)


LOGISTIC = {
    "x": vector(30, 5, seed=6),
    "y": torch.sign(vector(30, seed=7) + vector(30, 5, seed=6)[:, 0]),
    "index": torch.arange(30),
}
TRUSTED = {
    "x": vector(12, 5, seed=8),
    "y": torch.sign(vector(12, 5, seed=8)[:, 0] + 0.1 * vector(12, seed=9)),
}


def margins(lower, batch) -> Tensor:
    return batch["y"] * (batch["x"] @ lower["w"] + lower["b"])


def logistic_problem() -> BilevelProblem:
    def lower_loss(lower, upper, batch):
        weights = torch.sigmoid(upper["raw"][batch["index"]])
        ridge = 0.5 * upper["log_ridge"].exp() * lower["w"].square().sum()
        return (weights * functional.softplus(-margins(lower, batch))).mean() + ridge

    def upper_loss(lower, upper, batch):
        direct = 0.01 * upper["raw"].square().sum()
        return functional.softplus(-margins(lower, batch)).mean() + direct

    return BilevelProblem(lower_loss, upper_loss, lambda batch: len(batch["y"]))


LOGISTIC_UPPER = {
    "raw": 0.5 * vector(30, seed=10),
    "log_ridge": torch.tensor(-2.0, dtype=torch.float64),
}
ZERO = {"w": torch.zeros(5, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}


def solved_upper(problem, params, batch, upper_batch):
    """φ -> L_upper(θ*(φ), φ)."""
    return lambda upper: problem.upper_loss(
        newton(problem, params, upper, batch), upper, upper_batch
    )


def assert_is_the_slope(found, function, upper, tolerance=1e-7):
    for seed in (0, 1, 2):
        direction = random_like(upper, seed)
        expected = slope(function, upper, direction)
        assert abs(float(tree.vdot(found, direction)) / expected - 1.0) <= tolerance


@pytest.mark.parametrize("product", PRODUCTS)
def test_logistic_regression_against_differences_of_its_solutions(product):
    problem = logistic_problem()
    params = newton(problem, ZERO, LOGISTIC_UPPER, LOGISTIC)
    implicit = Implicit(ConjugateGradient(20, 1e-12), product=product)
    found = differentiate(implicit, problem, params, LOGISTIC_UPPER, [LOGISTIC], TRUSTED)
    function = solved_upper(problem, params, LOGISTIC, TRUSTED)
    assert_is_the_slope(found.hypergradient, function, LOGISTIC_UPPER)


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_reweighting_problem_by_every_product(product):
    """Weights from a table, no ridge, and the lower losses given per example."""
    problem = ReweightingProblem(
        lambda lower, batch: (functional.softplus(-margins(lower, batch)), None),
        lambda upper, batch, features: torch.sigmoid(upper["raw"][batch["index"]]),
        lambda lower, upper, batch: functional.softplus(-margins(lower, batch)).mean(),
    )
    upper = {"raw": LOGISTIC_UPPER["raw"]}
    params = newton(problem, ZERO, upper, LOGISTIC)
    implicit = Implicit(ConjugateGradient(20, 1e-12), product=product)
    function = solved_upper(problem, params, LOGISTIC, TRUSTED)
    found = differentiate(implicit, problem, params, upper, [LOGISTIC], TRUSTED)
    assert_is_the_slope(found.hypergradient, function, upper)
    halves = [{key: value[rows] for key, value in LOGISTIC.items()} for rows in (ROWS, OTHERS)]
    apart = differentiate(implicit, problem, params, upper, halves, TRUSTED)
    assert relative(apart.hypergradient, found.hypergradient) <= limit_of(implicit)


ROWS, OTHERS = list(range(11)), list(range(11, 30))


def test_a_network_at_a_minimum():
    """Hidden units behind a layer norm, φ under the loss and in the ridge, not convex."""

    def lower_loss(lower, upper, batch):
        hidden = torch.tanh(batch["x"] @ lower["in"] + lower["shift"])
        hidden = functional.layer_norm(hidden, (4,), lower["scale"])
        output = hidden @ lower["out"] + lower["b"]
        loss = (torch.sigmoid(upper["raw"]) * functional.softplus(-batch["y"] * output)).mean()
        ridge = sum(leaf.square().sum() for leaf in lower.values())
        return loss + 0.05 * upper["log_ridge"].exp() * ridge

    def upper_loss(lower, upper, batch):
        hidden = torch.tanh(batch["x"] @ lower["in"] + lower["shift"])
        output = functional.layer_norm(hidden, (4,), lower["scale"]) @ lower["out"] + lower["b"]
        return functional.softplus(-batch["y"] * output).mean()

    problem = BilevelProblem(lower_loss, upper_loss)
    params = {
        "in": vector(5, 4, seed=11),
        "shift": vector(4, seed=12),
        "scale": torch.ones(4, dtype=torch.float64),
        "out": vector(4, seed=13),
        "b": torch.zeros((), dtype=torch.float64),
    }
    optimizer = torch.optim.LBFGS(
        leaves := [leaf.requires_grad_() for leaf in params.values()],
        max_iter=300,
        tolerance_grad=1e-9,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = problem.lower_loss(dict(zip(params, leaves, strict=True)), LOGISTIC_UPPER, LOGISTIC)
        loss.backward()
        return loss

    optimizer.step(closure)
    params = newton(problem, tree.map(Tensor.detach, params), LOGISTIC_UPPER, LOGISTIC)
    found = differentiate(
        Implicit(ConjugateGradient(200, 1e-12)),
        problem,
        params,
        LOGISTIC_UPPER,
        [LOGISTIC],
        TRUSTED,
    )
    assert found.notes == ()
    function = solved_upper(problem, params, LOGISTIC, TRUSTED)
    assert_is_the_slope(found.hypergradient, function, LOGISTIC_UPPER, 1e-6)


@pytest.mark.parametrize("name", ["encoder", "vision"])
def test_layer_norm_gelu_and_convolutions_by_the_formula(name):
    """Anywhere: ∂F/∂φ − ∂/∂φ ⟨∇L, (∇²L + δ)⁻¹ ∇F⟩ with matrices by torch.func."""
    case = build(name)
    problem, batch, damping = case.problem, case.batch, 5.0
    flat, lower = flattened(case.params)
    hessian = hessian_of(lambda t: problem.lower_loss(lower(t), case.upper_params, batch), flat)
    v, direct = torch.func.grad(
        lambda t, u: problem.upper_loss(lower(t), u, case.upper_batch), argnums=(0, 1)
    )(flat, case.upper_params)
    q = torch.linalg.solve(hessian + damping * torch.eye(len(flat), dtype=torch.float64), v)

    def along(upper):
        gradient = torch.func.grad(lambda t: problem.lower_loss(lower(t), upper, batch))(flat)
        return gradient @ q

    expected = tree.axpy(-1.0, torch.func.grad(along)(case.upper_params), direct)
    for product in PRODUCTS:
        implicit = Implicit(
            ConjugateGradient(200, 1e-12, damping), product=product, stationarity_tolerance=None
        )
        found = differentiate(
            implicit, problem, case.params, case.upper_params, [batch], case.upper_batch
        )
        assert relative(found.hypergradient, expected) <= limit_of(implicit, 1e-10), product


# Limits: unrolling at a fixed point.


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_neumann_is_the_truncated_unroll_at_a_fixed_point(steps):
    """Neumann(K − 1, η) is the hypergradient through K plain gradient steps of length η."""
    problem, lr = logistic_problem(), 0.4
    params = newton(problem, ZERO, LOGISTIC_UPPER, LOGISTIC)
    implicit = Implicit(Neumann(steps - 1, lr))
    found = differentiate(implicit, problem, params, LOGISTIC_UPPER, [LOGISTIC], TRUSTED)
    upper = tree.map(lambda leaf: leaf.detach().requires_grad_(), LOGISTIC_UPPER)
    point = tree.map(lambda leaf: leaf.detach().requires_grad_(), params)
    for _ in range(steps):
        loss = problem.lower_loss(point, upper, LOGISTIC)
        grads = torch.autograd.grad(loss, list(point.values()), create_graph=True)
        point = {
            name: leaf - lr * grad for (name, leaf), grad in zip(point.items(), grads, strict=True)
        }
    problem.upper_loss(point, upper, TRUSTED).backward()
    by_hand = tree.map(lambda leaf: leaf.grad, upper)
    assert relative(found.hypergradient, by_hand) <= 1e-10
    optimizer = SGD(lr)
    arguments = problem, optimizer, params, LOGISTIC_UPPER, optimizer.init(params)
    unrolled = run_window(Unrolled(), *arguments, [[LOGISTIC]] * steps, TRUSTED)
    assert relative(unrolled.hypergradient, found.hypergradient) <= 1e-10
    if steps == 1:
        one = run_window(OneStep(Jvp()), *arguments, [[LOGISTIC]], TRUSTED)
        assert relative(one.hypergradient, found.hypergradient) <= 1e-10


def test_many_unrolled_steps_become_the_implicit_hypergradient():
    """At the rate 1 − η λ_min per step."""
    problem, implicit = logistic_problem(), Implicit(ConjugateGradient(20, 1e-13))
    params = newton(problem, ZERO, LOGISTIC_UPPER, LOGISTIC)
    limit = differentiate(implicit, problem, params, LOGISTIC_UPPER, [LOGISTIC], TRUSTED)
    flat, joined = flattened(params)
    hessian = hessian_of(lambda t: problem.lower_loss(joined(t), LOGISTIC_UPPER, LOGISTIC), flat)
    values = torch.linalg.eigvalsh(hessian)
    optimizer = SGD(1.0 / float(values[-1]))
    arguments = problem, optimizer, params, LOGISTIC_UPPER, optimizer.init(params)
    errors = []
    for steps in (30, 34):
        unrolled = run_window(Unrolled(), *arguments, [[LOGISTIC]] * steps, TRUSTED)
        errors.append(relative(unrolled.hypergradient, limit.hypergradient))
    rate = (errors[1] / errors[0]) ** (1 / 4)
    assert abs(rate / float(1.0 - values[0] / values[-1]) - 1.0) <= 1e-2
    assert errors[1] <= 1e-2


# Warm start, notes and figures.


def run(implicit, windows=2, lr=1e-3, steps=30):
    problem = logistic_problem()
    solver = BilevelSolver(problem, SGD(1.0), SGD(lr), implicit, unroll_steps=steps)
    params = newton(problem, ZERO, LOGISTIC_UPPER, LOGISTIC)
    state, infos = solver.init(params, LOGISTIC_UPPER), []
    for _ in range(windows):
        state, found = solver.window(state, [[LOGISTIC]] * steps, TRUSTED)
        infos.append(found[-1])
    return solver, state, infos


def test_a_warm_start_saves_iterations():
    tolerance = ConjugateGradient(50, 1e-5)
    cold = run(Implicit(tolerance, warm_start=False))[2]
    warm = run(Implicit(tolerance))[2]
    counts = [[int(info.figures["iterations"]) for info in infos] for infos in (cold, warm)]
    assert counts[0][0] == counts[0][1] == counts[1][0]
    assert counts[1][1] <= counts[0][1] - 2
    assert all(float(info.figures["residual"]) <= 1e-5 for info in (*cold, *warm))
    gap = abs(float(warm[1].hypergradient_norm / cold[1].hypergradient_norm) - 1.0)
    assert gap <= 1e-4


def test_a_state_resumes_with_its_warm_start():
    implicit = Implicit(ConjugateGradient(50, 1e-5))
    solver, _, _ = run(implicit, windows=0)
    _, one, _ = run(implicit, windows=1)
    _, two, infos = run(implicit, windows=2)
    example = solver.init(ZERO, LOGISTIC_UPPER)
    state = tree.unflatten(tree.flatten(one), example)
    assert float(tree.norm(state.memory.solution)) > 0.0
    state, found = solver.window(state, [[LOGISTIC]] * 30, TRUSTED)
    assert all(torch.equal(p, q) for p, q in zip(tree.leaves(state), tree.leaves(two), strict=True))
    assert found[-1].figures["iterations"] == infos[-1].figures["iterations"]


def test_figures():
    """Stationarity in one dimension is |w − w*| / |w|; the change of a linear upper loss exact."""
    curvature, target, slope_of_upper = 4.0, 3.0, -2.0
    for scale, stretch in ((1.0, 1.0), (100.0, 1.0), (1.0, 0.01)):

        def lower_loss(lower, upper, batch, scale=scale, stretch=stretch):
            w = lower["w"] / stretch
            return scale * (0.5 * curvature * (w - upper["t"]).square() + 7.0)

        def upper_loss(lower, upper, batch, stretch=stretch):
            return slope_of_upper * lower["w"] / stretch

        problem = BilevelProblem(lower_loss, upper_loss)
        params = {"w": torch.tensor(3.5 * stretch, dtype=torch.float64)}
        upper = {"t": torch.tensor(target, dtype=torch.float64)}
        implicit = Implicit(stationarity_tolerance=1.0)
        found = differentiate(implicit, problem, params, upper)
        assert abs(float(found.figures["stationarity"]) - 0.5 / 3.5) <= 1e-12
        assert abs(float(found.figures["upper_change"]) - slope_of_upper * (3.0 - 3.5)) <= 1e-12
        assert abs(float(found.hypergradient["t"]) - slope_of_upper) <= 1e-12
        assert int(found.figures["iterations"]) == 1
        assert int(found.figures["products"]) == 2


def test_far_from_stationary_is_said():
    """In every note, and by one warning in a run; not at all without a tolerance."""
    problem = logistic_problem()
    solver = BilevelSolver(problem, SGD(0.1), SGD(0.1), Implicit())
    state = solver.init(tree.map(torch.ones_like, ZERO), LOGISTIC_UPPER)
    with pytest.warns(StationarityWarning, match="far from stationary") as caught:
        state, info = solver.step(state, [LOGISTIC], TRUSTED)
    assert len(caught) == 1
    assert str(caught[0].message) == info.notes[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state, info = solver.step(state, [LOGISTIC], TRUSTED)
        assert "stationarity_tolerance 0.01" in info.notes[0]
        assert float(info.figures["stationarity"]) > 0.01
        silent = replace(solver, hypergradient=Implicit(stationarity_tolerance=None))
        _, info = silent.step(silent.init(ZERO, LOGISTIC_UPPER), [LOGISTIC], TRUSTED)
    assert info.notes == ()
    assert "stationarity" not in info.figures


def test_stationarity_follows_the_error_of_the_hypergradient():
    """Over six orders of magnitude of lower convergence, within a factor of ten."""
    problem, implicit = logistic_problem(), Implicit(Dense(), stationarity_tolerance=1e9)
    solution = newton(problem, ZERO, LOGISTIC_UPPER, LOGISTIC)
    exact = differentiate(implicit, problem, solution, LOGISTIC_UPPER, [LOGISTIC], TRUSTED)
    optimizer, params = SGD(2.0), tree.map(lambda leaf: leaf + 0.01, ZERO)
    state, seen = optimizer.init(params), []
    for _ in range(8):
        for _ in range(12):
            grads = torch.func.grad(problem.lower_loss)(params, LOGISTIC_UPPER, LOGISTIC)
            params, state = optimizer.update(grads, state, params)
        found = differentiate(implicit, problem, params, LOGISTIC_UPPER, [LOGISTIC], TRUSTED)
        error = relative(found.hypergradient, exact.hypergradient)
        figure = float(found.figures["stationarity"])
        assert 0.1 <= error / figure <= 10.0
        seen.append(figure)
    assert seen[0] > 1e-2
    assert seen[-1] < 1e-8


def test_a_saddle():
    """Indefinite H: the guard stops. Nothing better than q = 0 is no answer; a note says why."""
    matrix = A - 1.2 * torch.eye(4, dtype=torch.float64)
    assert torch.linalg.eigvalsh(matrix)[0] < 0.0 < torch.linalg.eigvalsh(matrix)[-1]
    params = quadratic_solution(X, matrix)
    found = differentiate(Implicit(), quadratic(matrix), params, {"x": X})
    assert torch.isnan(found.hypergradient["x"]).all()
    assert any("ConjugateGradient(): curvature" in note for note in found.notes)
    found = differentiate(Implicit(Neumann()), quadratic(matrix), params, {"x": X})
    assert tree.allfinite(found.hypergradient)
    assert any("Neumann(): the residual grew" in note for note in found.notes)
    away = tree.map(lambda leaf: leaf + 1.0, params)
    downhill = replace(
        quadratic(), lower_loss=lambda lower, upper, batch: -lower["part"][0].square()
    )
    with pytest.warns(StationarityWarning, match=r"lies inf"):
        differentiate(Implicit(), downhill, away, {"x": X})


def test_a_gradient_that_is_rounding_is_stationary():
    """Along a flat direction the minimum is infinitely far, but nothing points there."""
    problem = BilevelProblem(
        lambda lower, upper, batch: (
            1.0 + 1e-17 * lower["w"][0] + 0.5 * (lower["w"][1] - upper["t"]).square()
        ),
        lambda lower, upper, batch: lower["w"][1],
    )
    one = torch.tensor(1.0, dtype=torch.float64)
    params = {"w": torch.tensor([2.0, 1.0], dtype=torch.float64)}
    found = differentiate(Implicit(), problem, params, {"t": one})
    assert float(found.figures["stationarity"]) == 0.0
    assert found.notes == ()
    assert torch.equal(found.hypergradient["t"], one)


# What a window does to everything else.


@pytest.mark.parametrize("name", ["dropout", "mlp"])
def test_lower_steps_and_random_numbers_are_those_of_plain_training(name):
    case, optimizer = build(name), Adam(0.05)
    implicit = Implicit(ConjugateGradient(2, damping=10.0), stationarity_tolerance=None)

    def window(upper_batch):
        torch.manual_seed(11)
        found = run_window(
            implicit,
            case.problem,
            optimizer,
            case.params,
            case.upper_params,
            optimizer.init(case.params),
            [[case.batch], [pick(case.batch, [0, 1]), pick(case.batch, [2, 3, 4])]],
            upper_batch,
            implicit.init(optimizer, case.params, case.upper_params),
        )
        return found, torch.get_rng_state()

    (plain, after), (found, after_too) = window(None), window(case.upper_batch)
    assert torch.equal(after, after_too)
    assert plain.hypergradient is None
    assert plain.upper_loss is None
    for one, other in zip(
        tree.leaves((plain.lower_params, plain.optimizer_state)),
        tree.leaves((found.lower_params, found.optimizer_state)),
        strict=True,
    ):
        assert torch.equal(one, other)
    assert [float(p.grad_norm) for p in plain.passes] == [float(p.grad_norm) for p in found.passes]


@pytest.mark.parametrize("product", PRODUCTS)
def test_parameters_that_the_lower_loss_does_not_use_are_no_part_of_the_system(product):
    """The upper loss may depend on them: they stay where they are, whatever φ is."""
    problem = quadratic()
    wider = BilevelProblem(
        lambda lower, upper, batch: problem.lower_loss(lower["used"], upper, batch),
        lambda lower, upper, batch: (
            problem.upper_loss(lower["used"], upper, batch) + lower["free"].exp().sum()
        ),
    )
    params = {
        "used": quadratic_solution(X),
        "free": torch.ones(3, dtype=torch.float64),
        "none": None,
    }
    implicit = Implicit(Dense(), product=product)
    found = differentiate(implicit, wider, params, {"x": X})
    (note,) = found.notes
    assert "does not depend on 1 of the 3 lower parameters ('free', ...)" in note
    expected = quadratic_hypergradient(X, INVERSE)
    assert relative(found.hypergradient["x"], expected) <= limit_of(implicit)
    assert torch.equal(found.memory.solution["free"], torch.zeros(3, dtype=torch.float64))
    assert found.memory.solution["none"] is None


def test_upper_losses_that_see_nothing_of_the_lower_level():
    """v = 0 or none at all: the direct part, in 0 iterations."""
    for upper_loss in (
        lambda lower, upper, batch: 0.5 * upper["x"] @ H @ upper["x"],
        lambda lower, upper, batch: 0.5 * upper["x"] @ H @ upper["x"] + 0.0 * lower["part"][0],
    ):
        problem = replace(quadratic(), upper_loss=upper_loss)
        found = differentiate(Implicit(), problem, quadratic_solution(X), {"x": X})
        torch.testing.assert_close(found.hypergradient["x"], H @ X, rtol=1e-14, atol=0)
        assert int(found.figures["iterations"]) == 0


def test_what_is_not_finite_never_reaches_the_upper_parameters():
    def broken(lower, upper, batch):
        return logistic_problem().upper_loss(lower, upper, batch) * batch["factor"]

    problem = replace(logistic_problem(), upper_loss=broken)
    params = newton(problem, ZERO, LOGISTIC_UPPER, LOGISTIC)
    solver = BilevelSolver(problem, SGD(0.1), SGD(0.1), Implicit())
    state = solver.init(params, LOGISTIC_UPPER)
    state, _ = solver.step(state, [LOGISTIC], {**TRUSTED, "factor": 1.0})
    after, info = solver.step(state, [LOGISTIC], {**TRUSTED, "factor": math.inf})
    assert int(after.upper_skipped) == 1
    assert torch.equal(after.upper_params["raw"], state.upper_params["raw"])
    assert torch.equal(after.memory.solution["w"], state.memory.solution["w"])
    assert any("right-hand side is not finite" in note for note in info.notes)


def test_a_window_is_its_steps_taken_one_by_one():
    solver, whole, _ = run(Implicit(), windows=2, steps=3)
    _, state, _ = run(Implicit(), windows=0, steps=3)
    for _ in range(6):
        state, _ = solver.step(state, [LOGISTIC], TRUSTED)
    assert all(
        torch.equal(p, q) for p, q in zip(tree.leaves(state), tree.leaves(whole), strict=True)
    )


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_other_precisions(dtype, limit):
    """In bfloat16 the products round; the system is solved in float32."""

    def to(found):
        return tree.map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, found)

    problem = logistic_problem()
    params = newton(problem, ZERO, LOGISTIC_UPPER, LOGISTIC)
    arguments = params, LOGISTIC_UPPER, [LOGISTIC], TRUSTED
    implicit = Implicit(ConjugateGradient(6, 1e-3), stationarity_tolerance=1.0)
    exact = differentiate(implicit, problem, *arguments)
    found = differentiate(implicit, problem, *(to(one) for one in arguments))
    assert found.hypergradient["raw"].dtype == dtype
    assert found.memory.solution["w"].dtype == torch.float32
    wide = tree.map(Tensor.double, found.hypergradient)
    assert relative(wide, exact.hypergradient) <= limit


def test_what_is_refused():
    for optimizer in (AdamW(0.1), SGD(0.1, weight_decay=0.1)):
        with pytest.raises(ValueError, match="lower optimizer's weight_decay"):
            BilevelSolver(logistic_problem(), optimizer, SGD(0.1), Implicit())
    BilevelSolver(logistic_problem(), AdamW(0.1, weight_decay=0.0), SGD(0.1), Implicit())
    with pytest.raises(ValueError, match=r"Implicit: product must be Auto\(\)"):
        Implicit(product=PerExample())
    with pytest.raises(ValueError, match="stationarity_tolerance"):
        Implicit(stationarity_tolerance=-1.0)
