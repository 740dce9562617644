"""The optimizer's step in place, part by part, and its derivative."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bilevel import SGD, AdaDelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSProp, tree
from bilevel.lower.steps import Point
from bilevel.optimizers.base import clip_scale
from bilevel.resident import parts
from bilevel.resident.adam import FusedAdam
from bilevel.resident.update import predict_, step_
from tests.bilevel.comparing import relative, same_bits

OWN_RULE = [
    SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.05),
    RMSProp(0.01, weight_decay=0.1),
    Adagrad(0.05),
    NAdam(0.02),
    RAdam(0.02, weight_decay=0.1),
    Adamax(0.02),
    AdaDelta(1.0),
    AdamW(0.02, state_dtype=torch.float64),
]
FUSED = [Adam(0.02, weight_decay=0.1), AdamW(0.02, weight_decay=0.1)]


def kind(optimizer):
    return type(optimizer).__name__


def draw(seed, dtype=torch.float64):
    """Leaves of several shapes: a scalar, one that is cut, and one whose rows are its columns."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)

    return {
        "scalar": leaf(),
        "small": leaf(3, 5),
        "long": leaf(7, 1000),
        "turned": leaf(40, 50).t(),
        "image": leaf(4, 3, 5, 5).to(memory_format=torch.channels_last),
        "untouched": leaf(6),
    }


def gradient(seed, dtype=torch.float64):
    """Contiguous, unlike the parameters; zeros in one row; none of the last leaf."""
    found = {name: leaf.contiguous() for name, leaf in draw(seed, dtype).items()}
    found["long"][2] = 0.0
    return found | {"untouched": None}


def warm(optimizer, dtype=torch.float64, steps=3):
    """θ and the state after some steps by the optimizer itself."""
    params = draw(0, dtype)
    state = optimizer.init(params)
    for step in range(steps):
        params, state = optimizer.update(gradient(1 + step, dtype), state, params)
    return tree.map(torch.clone, Point(params, state))


def cloned(point):
    return tree.map(torch.clone, point)


@pytest.fixture(params=[1 << 18, 999, 64], ids=["whole", "long leaf cut", "many parts"])
def entries(request, monkeypatch):
    """How many entries a part has."""
    monkeypatch.setattr(parts, "CPU_ENTRIES", request.param)


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("optimizer", OWN_RULE, ids=kind)
@pytest.mark.usefixtures("entries")
def test_a_step_in_place_has_the_bits_of_the_update(optimizer, max_norm):
    """Where parts are vectors of whole registers; a tail may be rounded by another instruction."""
    optimizer = replace(optimizer, max_norm=max_norm)
    point, grads = warm(optimizer), gradient(9)
    expected = optimizer.update(grads, point.optimizer_state, point.lower_params)
    kept = cloned(point)
    found = step_(optimizer, kept, cloned(grads), tree.norm(grads))
    assert found.lower_params is kept.lower_params
    assert int(found.optimizer_state.steps) == int(point.optimizer_state.steps) + 1
    for one, other in zip(tree.leaves(found), tree.leaves(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=5e-16, atol=0.0)


@pytest.mark.parametrize("optimizer", OWN_RULE, ids=kind)
def test_as_one_part_the_bits_are_equal(optimizer):
    optimizer = replace(optimizer, max_norm=0.5)
    point, grads = warm(optimizer), gradient(9)
    expected = optimizer.update(grads, point.optimizer_state, point.lower_params)
    found = step_(optimizer, cloned(point), cloned(grads), tree.norm(grads))
    assert same_bits(tuple(found), tuple(expected))


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("weight", [None, 0.7, 0.0, -1.3])
@pytest.mark.parametrize("optimizer", [*OWN_RULE, *FUSED], ids=kind)
@pytest.mark.usefixtures("entries")
def test_slopes_are_the_derivative_of_the_step_along_the_gradient(optimizer, weight, steps):
    """⟨v, h⟩ = ⟨μ, g⟩ for μ by ``grads_vjp`` of the functional optimizer, leaf by leaf."""
    optimizer = replace(optimizer, max_norm=0.5)
    point, raw = warm(optimizer, steps=steps), gradient(9)
    grads = raw if weight is None else tree.scale(weight, raw)
    norm, v = tree.norm(grads), draw(20)
    mu = optimizer.grads_vjp(grads, point.optimizer_state, point.lower_params, v)
    moved = optimizer.update(grads, point.optimizer_state, point.lower_params)
    along = cloned(raw)
    found = step_(optimizer, cloned(point), along, norm, weight=weight, slopes=True)
    assert relative(found.lower_params, moved[0]) < 1e-15
    for name, leaf in along.items():
        if leaf is not None:
            expected, size = tree.vdot(mu[name], raw[name]), tree.norm(mu[name] * raw[name])
            # From a cold state the two terms of Adam's derivative cancel, each as large as v · lr.
            cancelled = 1e-15 * tree.norm(v[name])
            assert abs(tree.vdot(v[name], leaf) - expected) <= 1e-12 * size + cancelled, name


def few_rows(monkeypatch):
    """θ with an embedding in four parts, and a gradient of four of its rows, in three blocks."""
    monkeypatch.setattr(parts, "CPU_ENTRIES", 4096)
    monkeypatch.setattr(parts, "BLOCK", 64)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(400, 32, dtype=torch.float64, generator=generator)
    grads = {"rows": torch.zeros_like(rows), "small": rows[:3].clone()}
    grads["rows"][[5, 130, 131, 399]] = rows[:4]
    params = {"rows": rows, "small": rows[:3].clone()}
    return params, grads


@pytest.mark.parametrize("optimizer", [*OWN_RULE, *FUSED], ids=kind)
def test_rows_that_no_example_reaches(monkeypatch, optimizer):
    """Slopes and predicted directions are those of the whole; Adam's slopes are of three blocks."""
    params, grads = few_rows(monkeypatch)
    state = optimizer.init(params)
    for step in range(2):
        dense = tree.map(lambda leaf, step=step: (leaf + 0.1 * step).cos(), params)
        params, state = optimizer.update(dense, state, params)
    point, sizes = tree.map(torch.clone, Point(params, state)), []
    slope_ = FusedAdam.slope_

    def counted(self, raw, *others):
        sizes.append(sum(leaf.numel() for leaf in raw))
        slope_(self, raw, *others)

    monkeypatch.setattr(FusedAdam, "slope_", counted)
    along = tree.map(torch.clone, grads)
    found = step_(optimizer, cloned(point), along, tree.norm(grads), slopes=True)
    moved = optimizer.update(grads, state, params)
    assert relative(found.lower_params, moved[0]) < 1e-15
    assert relative(along, optimizer.grads_vjp(grads, state, params, grads)) < 1e-13
    if optimizer == AdamW(0.02, weight_decay=0.1):
        assert sum(sizes) == 3 * 64 + grads["small"].numel()
    v = tree.map(torch.clone, grads)
    predict_(optimizer, point, v)
    assert relative(v, optimizer.predicted_grads_vjp(state, params, grads)) < 1e-15


@pytest.mark.parametrize("optimizer", FUSED, ids=kind)
@pytest.mark.usefixtures("entries")
def test_the_fused_kernel_takes_the_same_step(optimizer):
    """Whatever the strides of parameters and gradients are, with groups and a decay mask."""
    optimizer = replace(
        optimizer,
        lr={"a": 0.02, "b": lambda count: 0.01 * (count + 1)},
        group=lambda name: "a" if name in ("long", "image") else "b",
        decay_mask=lambda name: name != "turned",
        max_norm=0.5,
    )
    point, grads = warm(optimizer), gradient(9)
    expected = optimizer.update(grads, point.optimizer_state, point.lower_params)
    found = step_(optimizer, cloned(point), cloned(grads), tree.norm(grads))
    for one, other in zip(tree.leaves(found), tree.leaves(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("optimizer", FUSED, ids=kind)
def test_moments_laid_out_otherwise_than_the_parameters(optimizer):
    point, grads = warm(optimizer), gradient(9)
    expected = optimizer.update(grads, point.optimizer_state, point.lower_params)
    state = tree.map(lambda leaf: leaf.contiguous().clone(), point.optimizer_state)
    found = step_(optimizer, cloned(Point(point.lower_params, state)), grads, tree.norm(grads))
    for one, other in zip(tree.leaves(found), tree.leaves(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("optimizer", [*OWN_RULE, *FUSED], ids=kind)
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.usefixtures("entries")
def test_a_predicted_direction_has_the_bits_of_the_optimizers_own(optimizer, steps):
    point, v = warm(optimizer, steps=steps), draw(20) | {"untouched": None}
    expected = optimizer.predicted_grads_vjp(point.optimizer_state, point.lower_params, v)
    predict_(optimizer, point, v)
    for name, leaf in v.items():
        if leaf is not None:
            torch.testing.assert_close(leaf, expected[name], rtol=5e-16, atol=0.0)


@pytest.mark.parametrize("decoupled", [True, False])
def test_in_bfloat16_the_fused_step_rounds_once(decoupled):
    """Against float64 arithmetic from the same numbers."""
    optimizer = (AdamW if decoupled else Adam)(0.02, weight_decay=0.1)
    point, grads = warm(optimizer, torch.bfloat16), gradient(9, torch.bfloat16)
    wide = tree.map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, point)
    wide_grads = tree.map(torch.Tensor.double, grads)
    expected = optimizer.update(wide_grads, wide.optimizer_state, wide.lower_params)
    along = cloned(grads)
    found = step_(optimizer, point, along, tree.norm(grads), slopes=True)
    slopes = optimizer.grads_vjp(
        wide_grads, wide.optimizer_state, wide.lower_params, wide_grads | {"untouched": None}
    )
    eps = torch.finfo(torch.bfloat16).eps
    for name, leaf in found.lower_params.items():
        torch.testing.assert_close(leaf.double(), expected[0][name], rtol=eps, atol=1e-4)
    assert relative(tree.map(torch.Tensor.double, along), slopes) < 2 * eps


def test_a_clip_of_a_gradient_of_zeros_leaves_the_rule_alone():
    optimizer = SGD(0.1, max_norm=1.0)
    assert float(clip_scale(torch.zeros(()), 1.0)) == 1.0
    point = warm(optimizer)
    zeros = tree.zeros_like(point.lower_params)
    before = tree.map(torch.clone, point.lower_params)
    step_(optimizer, point, zeros, tree.norm(zeros))
    assert same_bits(point.lower_params, before)
