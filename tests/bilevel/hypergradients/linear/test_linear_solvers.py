"""Solvers of (A + δ I) x = b against factorisations, their own definitions, and bad matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bilevel import tree
from bilevel.hypergradients.linear.dense import Dense
from bilevel.hypergradients.linear.iterative import ConjugateGradient, Neumann
from bilevel.hypergradients.linear.nystrom import Nystrom
from bilevel.hypergradients.linear.system import flat, unflat

SIZE = 12


def nested(vector: Tensor):
    """A tree of a scalar, a matrix and a vector, nested, with a None."""
    return {"a": [vector[0], None], "b": (vector[1:7].view(2, 3), {"c": vector[7:]})}


def matrix(eigenvalues, seed=0, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    normal = torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    vectors = torch.linalg.qr(normal).Q
    return ((vectors * values) @ vectors.T).to(dtype)


def random(size=SIZE, seed=1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Counted:
    """v -> A v on trees like `nested`, counting; `bad` replaces the product of that call."""

    def __init__(self, a: Tensor, bad: int | None = None):
        self.a, self.calls, self.bad = a, 0, bad

    def __call__(self, vector):
        self.calls += 1
        image = self.a @ flat(vector).to(self.a.dtype)
        if self.calls == self.bad:
            image = image * math.inf
        return unflat(image, vector)


def solve(solver, a, b, initial=None):
    """Return the solution as a vector, what the solver said, and how often it asked."""
    product = Counted(a)
    start = None if initial is None else nested(initial)
    found = solver.solve(product, nested(b), start)
    assert found.products == product.calls
    return flat(found.solution), found


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def exact(a: Tensor, b: Tensor, damping=0.0) -> Tensor:
    eye = torch.eye(len(b), dtype=torch.float64)
    return torch.linalg.solve(a.double() + damping * eye, b.double())


POSITIVE = matrix(torch.linspace(0.5, 3.0, SIZE))


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("kind", [ConjugateGradient, Neumann, Nystrom, Dense])
def test_all_agree_with_a_factorisation(kind, damping):
    """Damping shifts: (A + δ I) x = b, and the residual is that of this system."""
    if kind is Nystrom:
        damping = damping or 1e-6
        solvers = [Nystrom(SIZE, damping), Nystrom(SIZE, damping, "rows"), Nystrom(99, damping)]
    elif kind is Dense:
        solvers = [Dense(damping)]
    else:
        solvers = [kind(2000, tolerance=1e-13, damping=damping)]
    b = random()
    for solver in solvers:
        x, found = solve(solver, POSITIVE, b)
        assert relative(x, exact(POSITIVE, b, damping)) <= 1e-10
        assert found.notes == ()
        assert found.residual <= 1e-10


@pytest.mark.parametrize("solver", [ConjugateGradient(3), Neumann(3, 0.2), Nystrom(3, 0.1)])
def test_the_residual_is_the_true_one(solver):
    b = random()
    x, found = solve(solver, POSITIVE, b)
    image = POSITIVE @ x + solver.damping * x
    assert abs(found.residual - float((b - image).norm() / b.norm())) <= 1e-12
    assert found.residual > 1e-2


@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_conjugate_gradients_minimise_over_the_krylov_space(iterations, damping):
    """Every iterate counts, the last too: the Galerkin solution in span{b, A b, ...}."""
    b = random()
    a = POSITIVE + damping * torch.eye(SIZE, dtype=torch.float64)
    powers = [b]
    for _ in range(iterations - 1):
        powers.append(a @ powers[-1])
    basis = torch.linalg.qr(torch.stack(powers, dim=1)).Q
    expected = basis @ torch.linalg.solve(basis.T @ a @ basis, basis.T @ b)
    x, found = solve(ConjugateGradient(iterations, damping=damping), POSITIVE, b)
    assert relative(x, expected) <= 1e-11
    assert found.iterations == iterations
    assert found.products == iterations + 1


def test_conjugate_gradients_end_after_as_many_steps_as_eigenvalues():
    a, b = matrix([1.0] * 5 + [4.0] * 4 + [9.0] * 3), random()
    x, found = solve(ConjugateGradient(50, 1e-12), a, b)
    assert found.iterations == 3
    assert relative(x, exact(a, b)) <= 1e-12


@pytest.mark.parametrize("iterations", [0, 1, 7])
def test_neumann_is_the_series_and_gradient_descent(iterations):
    b, step, damping = random(), 0.2, 0.1
    a = POSITIVE + damping * torch.eye(SIZE, dtype=torch.float64)
    factor = torch.eye(SIZE, dtype=torch.float64) - step * a
    series = sum(step * torch.linalg.matrix_power(factor, k) @ b for k in range(iterations + 1))
    descent = torch.zeros_like(b)
    for _ in range(iterations + 1):
        descent = descent - step * (a @ descent - b)
    x, found = solve(Neumann(iterations, step, damping=damping), POSITIVE, b)
    assert relative(x, series) <= 1e-13
    assert relative(x, descent) <= 1e-13
    assert found.iterations == iterations
    assert found.products == iterations + 1


def test_neumann_from_a_warm_start_continues_the_descent():
    b, step, start = random(), 0.2, exact(POSITIVE, random()) + 0.1 * random(seed=2)
    expected = start
    for _ in range(4):
        expected = expected - step * (POSITIVE @ expected - b)
    assert relative(solve(Neumann(3, step), POSITIVE, b, start)[0], expected) <= 1e-13


def test_neumann_finds_its_own_step():
    """Where b has every eigenvector the estimate is λ_max, from below."""
    b = random()
    x, _ = solve(Neumann(0, power_iterations=200), POSITIVE, b)
    assert relative(x, b / 3.0) <= 1e-9
    x, found = solve(Neumann(0, power_iterations=3), POSITIVE, b)
    assert found.products == 3 + 1
    assert 1.0 / 3.0 <= float((x / b).mean()) <= 2.0 / 3.0


@pytest.mark.parametrize("solver", [Neumann(40, 0.7), Neumann(40, 2.0)])
def test_a_step_that_is_too_large_cuts_the_series_at_its_best(solver):
    """λ_max = 3: the residual falls at first where 2 / η is between the eigenvalues."""
    b, step = random(), solver.step_size
    best, x = math.inf, torch.zeros_like(b)
    for _ in range(40):
        residual = float((b - POSITIVE @ x).norm() / b.norm())
        if residual > best:
            break
        best, x = residual, x + step * (b - POSITIVE @ x)
    found = solve(solver, POSITIVE, b)[1]
    assert abs(found.residual - best) <= 1e-12
    assert len(found.notes) == 1
    assert "step_size" in found.notes[0]
    assert "more damping" in found.notes[0]


INDEFINITE = matrix([-0.5, *torch.linspace(0.5, 3.0, SIZE - 1).tolist()])


def test_curvature_guard():
    """The note is right about the matrix, the result is the best iterate before it."""
    b = random()
    x, found = solve(ConjugateGradient(50, 1e-12), INDEFINITE, b)
    assert torch.isfinite(x).all()
    assert len(found.notes) == 1
    assert "not positive definite" in found.notes[0]
    before = [solve(ConjugateGradient(k), INDEFINITE, b)[1] for k in range(1, found.iterations + 1)]
    assert all(one.notes == () for one in before)
    best = min([1.0, *(one.residual for one in before)])
    assert abs(found.residual - best) <= 1e-10
    assert found.iterations >= 1
    x, found = solve(ConjugateGradient(50, 1e-12, damping=0.6), INDEFINITE, b)
    assert found.notes == ()
    assert relative(x, exact(INDEFINITE, b, 0.6)) <= 1e-10


@pytest.mark.parametrize("a", [-POSITIVE, torch.zeros_like(POSITIVE)], ids=["negative", "zero"])
def test_no_positive_direction_at_all(a):
    b = random()
    for solver in (ConjugateGradient(), Neumann()):
        x, found = solve(solver, a, b)
        assert torch.equal(x, torch.zeros_like(b))
        assert abs(found.residual - 1.0) <= 1e-15
        assert found.iterations == 0
        assert len(found.notes) == 1


def test_negative_directions_are_counted():
    b = random()
    note = solve(Nystrom(SIZE, 0.1), INDEFINITE, b)[1].notes[0]
    assert note.startswith("1 of 12 ")
    x, found = solve(Dense(), INDEFINITE, b)
    assert found.notes == ("1 of 12 eigenvalues are negative",)
    assert relative(x, exact(INDEFINITE, b)) <= 1e-12
    singular = matrix([0.0, 0.0, *torch.linspace(0.5, 3.0, SIZE - 2).tolist()])
    x, found = solve(Dense(), singular, singular @ b)
    assert found.notes == ("2 of 12 eigenvalues are 0 and were left out",)
    assert relative(x, torch.linalg.pinv(singular) @ singular @ b) <= 1e-11


SOLVERS = [ConjugateGradient(50, 1e-12), Neumann(5), Nystrom(4, 0.1), Dense()]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_nothing_to_solve_and_nothing_that_can_be_solved(solver):
    zero = torch.zeros(SIZE, dtype=torch.float64)
    x, found = solve(solver, POSITIVE, zero, random())
    assert torch.equal(x, zero)
    assert found[1:] == (0.0, 0, 0, ())
    broken = random()
    for bad in (math.nan, math.inf):
        broken[3] = bad
        x, found = solve(solver, POSITIVE, broken)
        assert torch.isnan(x).all()
        assert math.isnan(found.residual)
        assert found.notes == ("the right-hand side is not finite: no system was solved",)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_scalar_parameters(solver):
    """0-dimensional, where TorchOpt's cg takes no iteration at all."""
    a, b = torch.tensor(4.0, dtype=torch.float64), torch.tensor(-6.0, dtype=torch.float64)
    found = solver.solve(lambda v: {"x": a * v["x"]}, {"x": b})
    assert found.solution["x"].shape == ()
    expected = -6.0 / (4.0 + solver.damping)
    assert abs(float(found.solution["x"]) - expected) <= 1e-12
    assert found.residual <= 1e-12


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_scale_of_the_right_hand_side_does_not_matter(solver):
    """Also where its square under- or overflows float32."""
    a, b = POSITIVE.float(), random().float()
    reference, _ = solve(solver, a, b)
    for scale in (1e-30, 1e30):
        x, _ = solve(solver, a, b * scale)
        assert relative(x.double() / scale, reference.double()) <= 1e-5


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_a_product_that_is_not_finite(solver):
    product = Counted(POSITIVE, bad=3)
    found = solver.solve(product, nested(random()))
    assert len(found.notes) == 1
    assert "not finite" in found.notes[0] or "λ_max = inf" in found.notes[0]
    if isinstance(solver, ConjugateGradient):
        expected = solve(ConjugateGradient(2), POSITIVE, random())[0]
        assert relative(flat(found.solution), expected) <= 1e-13
        assert found.iterations == 2
    else:
        assert math.isnan(found.residual) or found.iterations == 0


def test_warm_start():
    b = random()
    truth = exact(POSITIVE, b)
    cold = solve(ConjugateGradient(50, 1e-8), POSITIVE, b)[1]
    near = solve(ConjugateGradient(50, 1e-8), POSITIVE, b, truth + 1e-5 * random(seed=3))[1]
    assert near.iterations < cold.iterations - 2
    assert near.residual <= 2e-8
    there = solve(ConjugateGradient(50, 1e-8), POSITIVE, b, truth)[1]
    assert there.iterations == 0
    assert there.products == 2


@pytest.mark.parametrize("solver", [ConjugateGradient(50, 1e-12), Neumann(9, 0.3)])
def test_a_warm_start_that_is_worse_than_none_is_dropped(solver):
    b = random()
    plain, _ = solve(solver, POSITIVE, b)
    for bad in (-exact(POSITIVE, b), torch.full((SIZE,), math.nan, dtype=torch.float64)):
        x, found = solve(solver, POSITIVE, b, bad)
        assert torch.equal(x, plain)
        assert found.notes[0].startswith("the warm start was dropped")


@pytest.mark.parametrize("sketch", ["gaussian", "rows"])
def test_nystrom_is_exact_from_the_rank_on(sketch):
    """A of rank 4: (A + δ I)⁻¹ b with 4 columns or more; with fewer the residual says so."""
    a, b = matrix([5.0, 3.0, 2.0, 1.0] + [0.0] * (SIZE - 4)), random()
    for rank in (4, 5, SIZE):
        x, found = solve(Nystrom(rank, 1e-3, sketch), a, b)
        assert relative(x, exact(a, b, 1e-3)) <= 1e-9
        assert found.residual <= 1e-9
        assert found.notes == ()
        assert found.products == rank + 1
    assert solve(Nystrom(3, 1e-3, sketch), a, b)[1].residual > 1e-2


def test_nystrom_is_the_woodbury_formula_of_its_source():
    """(1/δ)(b − C (δ W + CᵀC)⁻¹ Cᵀ b) with C the chosen columns of A, W their rows."""
    b, damping = random(), 0.2
    chosen = torch.randperm(SIZE, generator=torch.Generator().manual_seed(7))[:5]
    columns = POSITIVE[:, chosen]
    inner = damping * columns[chosen] + columns.T @ columns
    expected = (b - columns @ torch.linalg.solve(inner, columns.T @ b)) / damping
    x, _ = solve(Nystrom(5, damping, "rows", seed=7), POSITIVE, b)
    assert relative(x, expected) <= 1e-11


@pytest.mark.parametrize("sketch", ["gaussian", "rows"])
def test_nystrom_holds_in_float32(sketch):
    """Condition number 10⁶, where the source's formula loses two more digits."""
    a, b = matrix(torch.logspace(0, -6, 30, dtype=torch.float64)), random(30)
    a32, b32, damping = a.float(), b.float(), 1e-3
    found = Nystrom(30, damping, sketch).solve(lambda v: a32 @ v, b32)
    truth = exact(a, b, damping)
    assert relative(found.solution.double(), truth) <= 1e-3
    columns = a32
    inner = damping * a32 + columns.T @ columns
    woodbury = (b32 - columns @ torch.linalg.solve(inner, columns.T @ b32)) / damping
    assert relative(woodbury.double(), truth) > 1e-2


@pytest.mark.parametrize(
    "solver", [ConjugateGradient(12, 0.0, 0.3), Neumann(200, damping=0.3), Dense(0.3)]
)
def test_float32(solver):
    a, b = POSITIVE.float(), random().float()
    x, found = solve(solver, a, b)
    assert x.dtype == torch.float32
    assert relative(x.double(), exact(a, b, 0.3)) <= 2e-6
    assert found.residual <= 2e-6


def test_a_residual_that_rounding_keeps_up_is_noted():
    a = matrix(torch.logspace(0, -4, SIZE, dtype=torch.float64)).float()
    found = solve(ConjugateGradient(500, 1e-7), a, random().float())[1]
    assert found.notes[0].startswith("rounding")
    assert found.residual > 1e-6


def test_sixteen_bit_vectors_are_solved_in_float32():
    """Only the products round to bfloat16: their error, not the recurrence's, is what remains."""
    a, b = POSITIVE, random().bfloat16()
    product = Counted(a)
    found = ConjugateGradient(8, 1e-3).solve(
        lambda v: unflat(flat(product(v)).bfloat16(), tree.map(Tensor.bfloat16, v)), nested(b)
    )
    assert flat(found.solution).dtype == torch.float32
    assert relative(flat(found.solution).double(), exact(a, b)) <= 2e-2
    assert found.residual <= 2e-2


def test_arguments_are_not_changed():
    b, start = random(), random(seed=5) * 0.01
    for solver in SOLVERS:
        given, initial = b.clone(), start.clone()
        solve(solver, POSITIVE, given, initial)
        assert torch.equal(given, b)
        assert torch.equal(initial, start)


def test_a_leaf_without_a_product_counts_as_zero():
    """None from the product, as from a parameter that the loss does not use."""
    b = {"x": torch.tensor([2.0, 4.0]), "y": torch.tensor(3.0)}
    found = ConjugateGradient(damping=0.5).solve(lambda v: {"x": v["x"], "y": None}, b)
    torch.testing.assert_close(found.solution["x"], b["x"] / 1.5, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.solution["y"], torch.tensor(6.0), rtol=1e-6, atol=0)


def test_what_is_refused():
    with pytest.raises(ValueError, match="expected at most entries_limit=11 entries, found 12"):
        solve(Dense(entries_limit=11), POSITIVE, random())
    for kind, wrong in (
        (ConjugateGradient, {"iterations": 0}),
        (ConjugateGradient, {"tolerance": -1.0}),
        (ConjugateGradient, {"damping": math.nan}),
        (Neumann, {"iterations": -1}),
        (Neumann, {"step_size": 0.0}),
        (Neumann, {"power_iterations": 0}),
        (Nystrom, {"rank": 0}),
        (Nystrom, {"damping": 0.0}),
        (Nystrom, {"sketch": "sparse"}),
        (Dense, {"damping": -1.0}),
    ):
        with pytest.raises(ValueError, match=f"{kind.__name__}: {next(iter(wrong))}"):
            kind(**wrong)
