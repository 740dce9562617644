"""Gradients in pieces: every entry once, in memory of its own, and the same steps from them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bilevel import SGD, AdaDelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSProp, tree
from bilevel.lower.steps import Point
from bilevel.resident.adam import FusedAdam
from bilevel.resident.pieces import Gathered, Gathering, Piece, in_pieces
from bilevel.resident.streamed import streamed_backward
from bilevel.resident.update import group_names, predict_in_pieces, step_in_pieces_
from tests.bilevel.comparing import relative, same_bits

SHAPES = {"a": (3, 5), "b": (), "c": (7, 10), "d": (4,), "e": (2, 2, 3)}


def draw(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
        for name, shape in SHAPES.items()
    }


def gathered(values, entries=20, keys=None, order=None):
    """Leaves of a dict in pieces of at most so many entries; those that are None are left out."""
    found = Gathered(keys or [None] * len(values), [])
    gathering = Gathering(found.keys, found.pieces.append, entries)
    leaves = list(values.values())
    for index in order or range(len(leaves)):
        if leaves[index] is not None:
            gathering.add(index, leaves[index])
    gathering.finish()
    return found


def warm(optimizer, dtype=torch.float64):
    """θ and the state after three steps of the optimizer itself, with zeros in each gradient."""
    params = draw(0, dtype)
    state = optimizer.init(params)
    for step in range(3):
        params, state = optimizer.update(gradient(1 + step, dtype), state, params)
    return tree.map(torch.clone, Point(params, state))


def gradient(seed, dtype=torch.float64):
    found = draw(seed, dtype)
    found["c"][2] = 0.0
    return found


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 2, 0, 1, 3]])
@pytest.mark.parametrize("entries", [1, 20, 1000])
def test_every_leaf_is_in_one_piece(entries, order):
    values = draw(0)
    found = gathered(values, entries, order=order)
    assert [index for piece in found.pieces for index in piece.leaves] == order
    for piece in found.pieces:
        assert piece.flat.dim() == 1
        assert len(piece.flat) <= entries or len(piece.leaves) == 1
    views = found.views(list(values.values()))
    for view, value in zip(views, values.values(), strict=True):
        assert torch.equal(view, value)
        assert view.shape == value.shape
    for piece in found.pieces:
        piece.flat.zero_()
    assert not any(view.any() for view in views)
    assert all(value.any() for value in values.values())


def test_leaves_of_other_keys_and_precisions_are_kept_apart():
    values = draw(0) | {"f": torch.zeros(3), "g": torch.zeros(2)}
    found = gathered(values, 1000, keys=["x", "y", "x", "y", "x", "x", "y"])
    assert {piece.leaves for piece in found.pieces} == {(0, 2, 4), (1, 3), (5,), (6,)}


def test_the_same_memory_given_twice_becomes_two():
    one = torch.ones(6)
    found = gathered({"a": one, "b": one.view(2, 3), "c": torch.ones(()).expand(4)}, 1)
    for piece in found.pieces:
        piece.flat.add_(1.0)
    assert [piece.flat.tolist() for piece in found.pieces] == [[2.0] * 6, [2.0] * 6, [2.0] * 4]
    assert one.tolist() == [1.0] * 6


def test_other_leaves_in_the_order_of_a_piece():
    values, like = draw(1), list(draw(0).values())
    leaves = list(values.values())
    mu = gathered(values, 1000, order=[4, 3, 0])
    views = mu.views(like)
    same = mu.in_order_of(Piece((4, 3, 0), torch.zeros(31)), views, like)
    assert same is mu.pieces[0].flat
    other = mu.in_order_of(Piece((0, 1, 4), torch.zeros(28)), views, like)
    expected = [leaves[0].flatten(), torch.zeros(1).double(), leaves[4].flatten()]
    assert torch.equal(other, torch.cat(expected))


def test_pieces_are_for_one_device_that_is_no_cpu():
    there = [SimpleNamespace(device=torch.device("cuda", index)) for index in range(2)]
    sharded = SimpleNamespace(device=torch.device("cuda", 0), device_mesh="of two")
    assert in_pieces({"a": there[0], "b": there[0]})
    assert not in_pieces({"a": there[0], "b": there[1]})
    assert not in_pieces({"a": there[0], "b": sharded})
    assert not in_pieces(draw(0))
    assert not in_pieces({})
    assert not in_pieces({"a": torch.zeros(2, device="meta")})


def test_a_streamed_gradient_is_that_of_autograd_and_is_kept_nowhere():
    """Sparse and dense leaves, one that is not reached, and one beside them."""
    table = torch.randn(5, 3).double().requires_grad_()
    weight, unused = torch.randn(3).double().requires_grad_(), torch.ones(2).requires_grad_()
    other = torch.tensor(2.0).double().requires_grad_()

    def loss():
        rows = torch.nn.functional.embedding(torch.tensor([1, 3, 1]), table, sparse=True)
        return other * (rows @ weight).square().sum()

    expected = torch.autograd.grad(loss(), [table, weight, other])
    found = {}
    streamed_backward(loss(), [table, None, weight, unused], [other], found.__setitem__)
    assert found.keys() == {0, 2}
    torch.testing.assert_close(found[0], expected[0].to_dense())
    torch.testing.assert_close(found[2], expected[1])
    torch.testing.assert_close(other.grad, expected[2])
    assert table.grad is None
    assert weight.grad is None


ADAMS = [Adam(0.02), AdamW(0.02, weight_decay=0.1), AdamW(0.02, max_norm=0.5)]


def kind(optimizer):
    return type(optimizer).__name__


@pytest.mark.parametrize("weight", [1.0, 0.7, -1.3])
@pytest.mark.parametrize("entries", [1, 20, 1000])
@pytest.mark.parametrize("optimizer", ADAMS, ids=kind)
def test_steps_and_slopes_are_those_of_the_functional_optimizer(optimizer, entries, weight):
    point, raw, v = warm(optimizer), gradient(9), draw(20)
    grads = tree.scale(weight, raw)
    expected = optimizer.update(grads, point.optimizer_state, point.lower_params)
    mu = optimizer.grads_vjp(grads, point.optimizer_state, point.lower_params, v)
    for slopes in (False, True):
        held, kept = gathered(raw, entries), tree.map(torch.clone, point)
        found = step_in_pieces_(optimizer, kept, held, tree.norm(grads), weight, slopes=slopes)
        assert found.lower_params is kept.lower_params
        assert int(found.optimizer_state.steps) == int(point.optimizer_state.steps) + 1
        for one, other in zip(tree.leaves(found), tree.leaves(tuple(expected)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)
    for name, leaf in held.like(raw).items():
        expected_dot = tree.vdot(mu[name], raw[name])
        size = tree.norm(mu[name] * raw[name])
        assert abs(tree.vdot(v[name], leaf) - expected_dot) <= 1e-12 * size, name


def test_slopes_of_a_cold_state_and_of_zeros():
    """From zero moments the two terms cancel but for eps; where the gradient is 0 all of it is."""
    kernel = FusedAdam(True, (0.9, 0.999), 1e-8, 1)
    ghat = torch.tensor([0.0, 1.0, -2.0]).double()
    first, second = 0.1 * ghat, 0.001 * ghat**2
    flat = ghat.clone()
    kernel.slope_of_piece_(flat, [first[:1], first[1:]], [second[:1], second[1:]], -0.5)
    # u = ĝ/(|ĝ| + eps), so that ĝ du/dĝ = ĝ eps/(|ĝ| + eps)².
    expected = -0.5 * ghat * 1e-8 / (ghat.abs() + 1e-8) ** 2
    torch.testing.assert_close(flat, expected, rtol=1e-6, atol=0.0)


def test_slopes_in_bfloat16_are_computed_in_float32():
    optimizer = AdamW(0.02, weight_decay=0.1)
    point, raw = warm(optimizer, torch.bfloat16), gradient(9, torch.bfloat16)
    wide = tree.map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, point)
    exact = tree.map(torch.Tensor.double, raw)
    expected = optimizer.grads_vjp(exact, wide.optimizer_state, wide.lower_params, exact)
    held = gathered(raw)
    assert step_in_pieces_(optimizer, point, held, tree.norm(raw), 1.0, slopes=True) is not None
    found = tree.map(torch.Tensor.double, held.like(raw))
    assert relative(found, expected) < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("optimizer", "weight"),
    [
        (RMSProp(0.02), 1.0),
        (Adam(0.02, weight_decay=0.1), 1.0),
        (AdamW(0.02, state_dtype=torch.float64), 1.0),
        (AdamW(0.02), 0.0),
        (AdamW(0.02), 1e-30),
    ],
    ids=["another rule", "coupled decay", "wider moments", "weight 0", "tiny weight"],
)
def test_what_only_a_step_leaf_by_leaf_can_take_changes_nothing(optimizer, weight):
    dtype = torch.float32 if optimizer.state_dtype else torch.float64
    point, raw = warm(optimizer, dtype), gradient(9, dtype)
    before, held = tree.map(torch.clone, point), gathered(raw)
    norm = tree.norm(raw) * weight
    assert step_in_pieces_(optimizer, point, held, norm, weight, slopes=True) is None
    assert same_bits(tuple(point), tuple(before))
    assert same_bits(held.like(raw), raw)


def test_parameters_that_lie_otherwise_are_left_to_a_step_leaf_by_leaf():
    optimizer = AdamW(0.02)
    params = draw(0) | {"c": draw(0)["c"].t().contiguous().t()}
    point = Point(params, optimizer.init(params))
    held = gathered(gradient(9))
    assert step_in_pieces_(optimizer, point, held, tree.norm(draw(9)), 1.0, slopes=True) is None


OPTIMIZERS = [
    SGD(0.1),
    *ADAMS,
    RMSProp(0.01),
    Adagrad(0.05),
    NAdam(0.02),
    RAdam(0.02),
    Adamax(0.02),
    AdaDelta(1.0),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=kind)
@pytest.mark.parametrize("entries", [1, 20, 1000])
def test_a_predicted_direction_is_the_optimizers_own(optimizer, entries):
    """Leaf by leaf with rates of two groups; a leaf that v does not reach has no direction."""
    optimizer = replace(
        optimizer,
        lr={"x": 0.02, "y": lambda count: 0.01 * (count + 1)},
        group=lambda name: "x" if name in "ac" else "y",
    )
    point, v = warm(optimizer), draw(20) | {"d": None}
    expected = optimizer.predicted_grads_vjp(point.optimizer_state, point.lower_params, v)
    held = gathered(v, entries, group_names(optimizer, point.lower_params))
    found = predict_in_pieces(optimizer, point, held).like(point.lower_params)
    assert found["d"] is None
    assert not held.pieces  # v is freed
    for name, leaf in expected.items():
        if leaf is not None:
            torch.testing.assert_close(found[name], leaf, rtol=1e-15, atol=0.0)
