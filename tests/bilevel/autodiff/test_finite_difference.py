"""Central differences: rate, step size, 16-bit parameters, randomness, directions out of range."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilevel import (
    SGD,
    Adam,
    BilevelProblem,
    BilevelSolver,
    CentralDifference,
    OneStep,
    Reverse,
    ReweightingProblem,
    tree,
)
from bilevel.autodiff.finite_difference import central_difference
from tests.bilevel.comparing import loglog_slope, relative
from tests.bilevel.run_case import run_case_step
from tests.bilevel.run_window import run_step
from tests.bilevel.variants import cast
from tests.bilevel.zoo import build, make, tokens
from tests.oracles import random_like

F64 = torch.float64


def cubic(params, _, watch):
    return (params["a"].pow(3).sum() + params["b"].prod(),)


def cubic_case():
    generator = torch.Generator().manual_seed(1)
    params = {"a": torch.randn(5, dtype=F64, generator=generator)}
    params["b"] = torch.randn(3, dtype=F64, generator=generator)
    direction = random_like(params, 2)
    along_a = (3 * params["a"].square() * direction["a"]).sum()
    products = params["b"].prod() / params["b"] * direction["b"]
    return params, direction, float(along_a + products.sum())


def test_the_error_is_of_second_order_in_the_step():
    """On a cubic exactly ε² (Σ d_a³ + Π d_b): slope 2, and the coefficient."""
    params, direction, exact = cubic_case()
    like = (torch.zeros((), dtype=F64),)
    steps = [10.0**-power for power in (0.5, 1, 1.5, 2, 2.5)]
    errors = []
    for step in steps:
        route = CentralDifference(radius=step * float(tree.norm(direction)))
        found = central_difference(route, cubic, params, direction, None, like)[0]
        errors.append(float(found) - exact)
        third = float(direction["a"].pow(3).sum() + direction["b"].prod())
        assert errors[-1] == pytest.approx(step**2 * third, rel=1e-6, abs=1e-12)
    assert loglog_slope(steps, [abs(error) for error in errors]) == pytest.approx(2.0, abs=1e-6)


def test_the_hypergradient_converges_at_second_order():
    """Lower loss φ·θ³: its mixed derivative along μ is 3 θ² μ, and the difference adds ε² μ³."""
    problem = BilevelProblem(
        lambda lower, upper, batch: (upper * lower.pow(3)).sum(),
        lambda lower, upper, batch: 0.5 * (lower - batch).square().sum(),
    )
    generator = torch.Generator().manual_seed(0)
    lower, upper, target = torch.randn(3, 4, dtype=F64, generator=generator)
    optimizer = SGD(0.1)
    arguments = (problem, optimizer, lower, upper, optimizer.init(lower), [None], target)
    exact = run_step(OneStep(Reverse()), *arguments).hypergradient
    mu = -0.1 * (lower - 0.3 * upper * lower.square() - target)
    torch.testing.assert_close(exact, 3 * lower.square() * mu, rtol=1e-12, atol=0)
    steps, errors = [1e-1, 3e-2, 1e-2, 3e-3], []
    for step in steps:
        found = run_step(OneStep(CentralDifference(step)), *arguments).hypergradient
        size = step * lower.norm() / mu.norm()
        torch.testing.assert_close(found - exact, size**2 * mu.pow(3), rtol=1e-5, atol=1e-13)
        errors.append(relative(found, exact))
    assert loglog_slope(steps, errors) == pytest.approx(2.0, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_step_that_is_taken(dtype):
    """ε ‖d‖ is a tenth of the cube root of the machine epsilon of θ's norm; or as told."""
    params = {"a": torch.randn(6).to(dtype), "still": torch.randn(3).to(dtype)}
    direction = {"a": torch.randn(6).to(dtype), "still": None}
    like = (torch.zeros((), dtype=dtype),)
    length, reach = float(direction["a"].norm()), float(params["a"].norm())
    unit = direction["a"] / length
    cube_root = torch.finfo(dtype).eps ** (1 / 3)
    atol = 2 * torch.finfo(dtype).eps * float(params["a"].abs().max())
    for route, distance in (
        (CentralDifference(), 0.1 * cube_root * reach),
        (CentralDifference(0.01), 0.01 * reach),
        (CentralDifference(radius=0.01), 0.01),
    ):
        seen = []

        def function(shifted, inputs, watch, seen=seen):
            assert shifted["still"].data_ptr() == params["still"].data_ptr()
            seen.append(shifted["a"])
            return (shifted["a"].sum(),)

        central_difference(route, function, params, direction, None, like)
        for sign, shifted in zip((1.0, -1.0), seen, strict=True):
            expected = params["a"] + sign * distance * unit
            torch.testing.assert_close(shifted, expected, rtol=0, atol=atol)


def test_parameters_that_are_all_zero_are_shifted_too():
    seen = []

    def function(shifted, inputs, watch):
        seen.append(shifted)
        return (shifted.sum(),)

    unit = torch.tensor([0.6, 0.8], dtype=F64)
    like = (torch.zeros((), dtype=F64),)
    central_difference(CentralDifference(0.01), function, 0 * unit, 5 * unit, None, like)
    torch.testing.assert_close(seen[0], 0.01 * unit, rtol=1e-14, atol=0)
    none = central_difference(CentralDifference(), function, unit, None, None, like)
    assert none == (0.0,)
    zero = central_difference(CentralDifference(), function, unit, 0 * unit, None, like)
    assert zero == (0.0,)
    assert len(seen) == 2


def test_betty_s_radius_needs_no_relative_step():
    with pytest.raises(ValueError, match="both set the step; give one"):
        CentralDifference(0.1, radius=0.01)
    with pytest.raises(ValueError, match=r"radius must lie in \(0, inf\), got 0\.0"):
        CentralDifference(radius=0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_direction_that_is_not_finite_is_reported_and_never_applied(bad):
    """The product is NaN without an evaluation; the solver keeps φ; θ still takes its step."""
    calls = []

    def per_example(lower, batch):
        calls.append(lower["w"].clone())
        return (batch @ lower["w"]).square(), None

    problem = ReweightingProblem(
        per_example,
        lambda upper, batch, features: upper["s"],
        lambda lower, upper, batch: batch * lower["w"].sum(),
    )
    lower = {"w": torch.tensor([0.5, -1.0, 2.0], dtype=torch.bfloat16)}
    upper = {"s": torch.ones(4)}
    batch = torch.randn(4, 3).bfloat16()
    solver = BilevelSolver(problem, SGD(0.1), SGD(0.1), OneStep(CentralDifference()))
    state = solver.init(lower, upper)
    before = {name: leaf.clone() for name, leaf in tree.flatten(state).items()}
    new, info = solver.step(state, [batch], torch.tensor(bad).bfloat16())
    assert len(calls) == 1  # the lower pass; nothing was evaluated along the direction
    assert any("not finite" in note for note in info.notes)
    assert int(new.upper_skipped) == 1
    assert torch.equal(new.upper_params["s"], upper["s"])
    assert bool(tree.allfinite(new.lower_params))
    assert not torch.equal(new.lower_params["w"], lower["w"])
    for name, leaf in tree.flatten(state).items():
        assert torch.equal(leaf, before[name]), name
    general = BilevelProblem(
        lambda lower, upper, batch: (upper["s"] * per_example(lower, batch)[0]).mean(),
        problem.upper_loss,
    )
    solver = replace(solver, problem=general)
    new, _ = solver.step(state, [batch], torch.tensor(bad).bfloat16())
    assert len(calls) == 2
    assert int(new.upper_skipped) == 1


@pytest.mark.parametrize("widen", [True, False])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
def test_parameters_and_batches_are_never_written(dtype, widen):
    case = cast(build("mlp"), dtype)
    held = {name: leaf.clone() for name, leaf in case.params.items()}
    inputs = case.batch["inputs"]["x"].clone()
    run_case_step(case, SGD(0.3), OneStep(CentralDifference(widen=widen)), warm_steps=0)
    for name, leaf in case.params.items():
        assert torch.equal(leaf, held[name])
        assert leaf.grad is None
    assert torch.equal(case.batch["inputs"]["x"], inputs)


def test_both_sides_see_the_random_numbers_of_the_step():
    """Under dropout the difference is that of one function: equal to the exact route's."""
    case = build("dropout")
    optimizer = Adam(0.05, (0.8, 0.9), 1e-3)
    exact = run_case_step(case, optimizer, OneStep(Reverse())).hypergradient
    found = run_case_step(case, optimizer, OneStep(CentralDifference())).hypergradient
    assert relative(found, exact) <= 1e-7


def test_the_generator_is_left_where_the_lower_pass_leaves_it():
    case, optimizer = build("dropout"), SGD(0.3)
    left = []
    for route in (Reverse(), CentralDifference()):
        run_case_step(case, optimizer, OneStep(route))
        left.append(torch.get_rng_state())
    assert torch.equal(*left)


def test_fused_attention_is_kept():
    """A loss that insists on a fused kernel, without forward-mode or second derivatives."""
    case = build("attention")
    inner = case.problem.per_example_loss

    def fused(lower, batch):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return inner(lower, batch)

    problem = replace(case.problem, per_example_loss=fused, upper_loss=case.problem.upper_loss)
    optimizer = SGD(0.3)
    exact = run_case_step(case, optimizer, OneStep(Reverse())).hypergradient
    found = run_case_step(replace(case, problem=problem), optimizer, OneStep(CentralDifference()))
    assert relative(found.hypergradient, exact) <= 1e-7


def along(case, route, dtype, direction):
    """Derivative of the losses along a given direction, at the parameters rounded to `dtype`."""
    case = cast(case, dtype)

    def losses(params, batch, watch):
        with torch.no_grad():
            return (case.problem.losses(params, batch)[0],)

    like = (torch.zeros(5, dtype=dtype),)
    return central_difference(route, losses, case.params, direction, case.batch, like)[0].double()


@pytest.mark.parametrize("name", ["mlp", "attention", "encoder", "vision"])
def test_16_bit_parameters_are_widened(name):
    """What is left is the rounding of the direction, not that of the losses at θ ± ε μ."""
    case = build(name)
    direction = random_like(case.params, 4)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = cast(cast(case, dtype), F64)
        d = tree.map(lambda leaf, dtype=dtype: leaf.to(dtype), direction)
        wide = tree.map(torch.Tensor.double, d)
        exact = along(rounded, CentralDifference(), F64, wide)
        widened = along(case, CentralDifference(), dtype, d)
        assert float((widened - exact).norm() / exact.norm()) <= 5e-4


def test_a_radius_of_a_hundredth_drowns_in_bfloat16():
    """Betty's step, in place, against ours: most weights do not move by it."""
    torch.manual_seed(0)
    weights = 0.02 * torch.randn(2_000_000)
    direction = torch.randn(2_000_000)
    params, along_ = weights.bfloat16(), direction / direction.norm()
    shifted = params + (0.01 * along_).bfloat16()
    assert float((shifted != params).float().mean()) < 0.35
    seen = {}
    for name, route in {
        "betty": CentralDifference(radius=0.01, widen=False),
        "ours": CentralDifference(widen=False),
        "widened": CentralDifference(),
    }.items():
        sides = []
        central_difference(
            route,
            lambda p, _, watch, sides=sides: (sides.append(p.double()), (p.sum(),))[1],
            params,
            along_,
            None,
            (torch.zeros(()),),
        )
        moved = (sides[0] - sides[1]) / 2
        seen[name] = float(torch.cosine_similarity(moved, along_.double(), dim=0))
    assert seen["betty"] < 0.5
    assert seen["ours"] > 0.9
    assert seen["widened"] > 0.999999


class Frozen(nn.Module):
    """A 16-bit weight that is not among the parameters, as a frozen base under an adapter."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)

    def forward(self, tokens):
        return self.head(self.embed(tokens)).mean(1)


def test_a_loss_with_16_bit_weights_of_its_own_says_what_to_choose():
    torch.manual_seed(3)
    frozen = lambda name: name.startswith("head")  # noqa: E731
    case = make(Frozen(), tokens, classes=11, frozen=frozen, dtype=torch.bfloat16)
    case = replace(case, upper_params=tree.map(torch.Tensor.float, case.upper_params))
    with pytest.raises(RuntimeError, match=r"16-bit tensors of its own.*widen=False"):
        run_case_step(case, SGD(0.3), OneStep(CentralDifference()), warm_steps=0)
    found = run_case_step(case, SGD(0.3), OneStep(CentralDifference(widen=False)), warm_steps=0)
    exact = run_case_step(case, SGD(0.3), OneStep(Reverse()), warm_steps=0)
    assert relative(found.hypergradient, exact.hypergradient) <= 0.1


def test_other_errors_of_the_loss_are_its_own():
    def broken(params, _, watch):
        raise RuntimeError("the data loader is on fire")

    params = torch.ones(2, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"^the data loader is on fire$"):
        central_difference(CentralDifference(), broken, params, params, None, (params,))


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_is_off_in_widened_passes(inside):
    """Around the step or entered by the loss; on again afterwards."""
    seen = []

    def function(params, _, watch):
        with watch, torch.autocast("cpu", dtype=torch.bfloat16, enabled=True):
            seen.append(functional.linear(params["x"], params["w"]).dtype)
            seen.append((params["x"] @ params["w"].T).dtype)
        return (params["w"].sum(),)

    params = {"x": torch.randn(2, 3), "w": torch.randn(4, 3)}
    like = (torch.zeros(()),)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
        for widen in (True, False):
            route = CentralDifference(widen=widen)
            central_difference(route, function, params, params, None, like)
        outside = torch.float32 if inside else torch.bfloat16
        assert functional.linear(params["x"], params["w"]).dtype == outside
    assert seen == [torch.float32] * 4 + [torch.bfloat16] * 4
