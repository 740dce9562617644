"""The chain of fallbacks: where forward mode fails the default is exact, and says what it took."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch.nn import functional

from bilevel import (
    BilevelProblem,
    ConjugateGradient,
    Implicit,
    Jvp,
    OneStep,
    PerExample,
    Refusal,
    Reverse,
    ReweightingProblem,
    Unrolled,
)
from tests.bilevel.by_hand import cubes, step_by_hand, step_of_solver
from tests.bilevel.comparing import relative

BATCH = 4
UPPER = {"raw": torch.tensor([-1.0, 0.2, 0.9, 2.0], dtype=torch.float64)}
# Of a decoder's forward-mode formulas, which torch compiles with its deprecated compiler.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch\\.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:index_reduce:UserWarning"),
]


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


BATCHES = {"x": draw(BATCH, 6), "image": draw(BATCH, 2, 5, 5, seed=1)}
WEIGHT = {"w": 0.3 * draw(6, 3, seed=2)}


class Cube(torch.autograd.Function):
    """Without a ``jvp``, and of the old style."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, b):
        (x,) = ctx.saved_tensors
        return 3 * b * x**2


def squared_sum(values):
    return torch.tanh(values).flatten(1).sum(1) ** 2


def gradient_penalty(p, b):
    x = b["x"].clone().requires_grad_()
    values = squared_sum(x @ p["w"])
    (slopes,) = torch.autograd.grad(values.sum(), x, create_graph=True)
    return values + (slopes.norm(dim=1) - 1.0) ** 2


def grid_sample(p, b):
    grid = torch.tanh(b["x"] @ p["w"])[:, None, None, :2].expand(-1, 3, 3, -1)
    return squared_sum(functional.grid_sample(b["image"], grid, align_corners=False))


def through_numpy(p, b):
    values = squared_sum(b["x"] @ p["w"])
    return values**2 * (1 + torch.from_numpy((values.detach().numpy() > 0.1).astype(float)))


def through_memory(p, b):
    assert p["w"].data_ptr()
    return squared_sum(b["x"] @ p["w"])


def through_a_copy(p, b):
    held = copy.deepcopy({name: leaf.detach() for name, leaf in p.items()})
    return squared_sum(b["x"] @ p["w"]) * held["w"].square().sum()


SPARSE = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]], dtype=torch.float64).to_sparse()
# name: (losses, parameters, the note's part on forward mode)
torch.manual_seed(0)
LACKING = {
    "custom function": (lambda p, b: squared_sum(Cube.apply(b["x"] @ p["w"])), WEIGHT, "override"),
    "custom function of a parameter": (
        lambda p, b: squared_sum(b["x"] @ Cube.apply(p["w"])),
        WEIGHT,
        "override",
    ),
    "gradient penalty": (gradient_penalty, WEIGHT, "requires_grad_"),
    "grid sample": (grid_sample, WEIGHT, "grid_sampler"),
    "sparse product": (
        lambda p, b: squared_sum(torch.sparse.mm(SPARSE, (b["x"] @ p["w"]).T).T),
        WEIGHT,
        "_sparse_addmm",
    ),
    "incomplete gamma function": (
        lambda p, b: torch.special.gammainc(
            torch.full((BATCH, 3), 1.5, dtype=torch.float64), (b["x"] @ p["w"]).abs() + 0.1
        ).sum(1),
        WEIGHT,
        "igamma",
    ),
    "index reduce": (  # in beta, as torch warns
        lambda p, b: squared_sum(
            torch.zeros(BATCH, 2, dtype=torch.float64).index_reduce(
                1, torch.tensor([0, 1, 1]), b["x"] @ p["w"], "amax"
            )
        ),
        WEIGHT,
        "index_reduce",
    ),
    "array": (through_numpy, WEIGHT, "data pointer"),
    "memory": (through_memory, WEIGHT, "data pointer"),
    "deep copy": (through_a_copy, WEIGHT, "storage"),
}


def reweighting(losses):
    return ReweightingProblem(
        lambda lower, batch: (losses(lower, batch), None),
        lambda upper, batch, features: torch.sigmoid(upper["raw"]),
        cubes,
    )


def scalar(losses):
    return BilevelProblem(
        lambda lower, upper, batch: (torch.sigmoid(upper["raw"]) * losses(lower, batch)).mean(),
        cubes,
    )


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", [reweighting, scalar], ids=["per example", "scalar"])
@pytest.mark.parametrize("name", LACKING)
def test_the_default_is_exact_where_forward_mode_fails(name, kind, steps):
    losses, params, part = LACKING[name]
    problem, method = kind(losses), OneStep() if steps == 1 else Unrolled()
    torch.manual_seed(1)
    lower, derivative = step_by_hand(problem.lower_loss, params, UPPER, BATCHES, steps)
    torch.manual_seed(1)
    found = step_of_solver(problem, method, params, UPPER, [BATCHES], 0, steps)
    assert relative(found[0], lower) <= 1e-12
    assert relative(found[1], derivative) <= 1e-10
    if found[2]:
        (note,) = found[2]
        assert note.startswith("Auto() took Reverse(): ")
        assert f"Jvp() fails ({note.partition('Jvp() fails (')[2]}" in note
        assert part in note
    else:  # The rules per example need no second derivative of the operation.
        assert (kind, steps) == (reweighting, 1)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", LACKING)
def test_a_small_problem_is_exact_there_at_once(name, steps):
    """Its products go through the graph of the lower pass, so that no route is tried in vain."""
    losses, params, _ = LACKING[name]
    problem, method = scalar(losses), OneStep() if steps == 1 else Unrolled()
    torch.manual_seed(1)
    lower, derivative = step_by_hand(problem.lower_loss, params, UPPER, BATCHES, steps)
    torch.manual_seed(1)
    found = step_of_solver(problem, method, params, UPPER, [BATCHES], 0, steps)
    assert relative(found[0], lower) <= 1e-12
    assert relative(found[1], derivative) <= 1e-10
    assert not found[2]


@pytest.mark.parametrize("kind", [reweighting, scalar], ids=["per example", "scalar"])
@pytest.mark.parametrize("name", LACKING)
def test_the_implicit_default_is_exact_where_forward_mode_fails(name, kind):
    losses, params, _ = LACKING[name]
    solver = ConjugateGradient(3, damping=50.0)
    ends = []
    for product in (Implicit(solver).product, Reverse()):
        method = Implicit(solver, product=product, stationarity_tolerance=None)
        torch.manual_seed(1)
        ends.append(step_of_solver(kind(losses), method, params, UPPER, [BATCHES], 0))
    assert relative(ends[0][1], ends[1][1]) <= 1e-12
    assert [note for note in ends[0][2] if note.startswith("Auto() took Reverse(): Jvp() fails")]
    assert not [note for note in ends[1][2] if "Auto()" in note]


def test_without_any_exact_route_the_error_says_why_each_fails():
    """No double backward and no forward mode: a difference is all that is left."""

    class Once(Cube):
        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, b):
            (x,) = ctx.saved_tensors
            return 3 * b * x**2

    problem = scalar(lambda p, b: squared_sum(Once.apply(b["x"] @ p["w"])))
    with pytest.raises(RuntimeError, match=r"Jvp\(\) fails .*; Reverse\(\) fails .*once_diff") as e:
        step_of_solver(problem, OneStep(), WEIGHT, UPPER, [BATCHES], 0)
    assert str(e.value).endswith("or choose the route CentralDifference()")


def test_no_advice_names_a_route_that_does_not_apply():
    losses, params, _ = LACKING["custom function of a parameter"]
    with pytest.raises(Refusal, match=r"or choose Auto\(\), which takes another route here$") as e:
        step_of_solver(reweighting(losses), OneStep(PerExample()), params, UPPER, [BATCHES], 0)
    assert "Jvp()" not in str(e.value)
    for kind in (reweighting, scalar):
        with pytest.raises(RuntimeError, match=r"choose the route Reverse\(\) or Central") as e:
            step_of_solver(kind(losses), OneStep(Jvp()), params, UPPER, [BATCHES], 0)
        assert "Ghost()" not in str(e.value)
    with pytest.raises(ValueError, match=r"found a BilevelProblem: choose Auto\(\)"):
        step_of_solver(scalar(losses), OneStep(PerExample()), params, UPPER, [BATCHES], 0)


def test_a_route_that_applies_is_not_commented_on():
    losses = LACKING["custom function"][0]

    def smooth(p, b):
        return squared_sum((b["x"] @ p["w"]) ** 3)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for problem in (reweighting(smooth), scalar(smooth), reweighting(losses)):
            assert step_of_solver(problem, OneStep(), WEIGHT, UPPER, [BATCHES], 0)[2] == ()
