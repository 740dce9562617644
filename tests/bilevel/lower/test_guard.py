"""What a guard that does not look keeps, and what then moves."""

from __future__ import annotations

import math

import pytest
import torch

from bilevel import SGD, Adam, AdamW, Ghost, OneStep, ResidentSolver, ReweightingProblem, tree
from bilevel.lower.guard import LOOKS, Late, counts, is_count, kept, with_counts


def flag(value):
    return torch.tensor(value)


def late(**more):
    return Late(flag(True), **more)


@pytest.mark.parametrize("value", [True, False])
def test_a_host_that_looks_is_told_the_value(value):
    assert LOOKS.usual is None
    assert LOOKS.holds(flag(value)) is value
    assert LOOKS.lower(torch.tensor(1.0 if value else math.nan), lambda: []) is value
    assert LOOKS.weights(flag(value), flag(not value)) == [value, not value]


def test_what_was_not_usual_once_is_not_usual_any_more():
    guard = late()
    for value, expected in ((True, True), (False, False), (True, False)):
        assert guard.holds(flag(value))
        assert bool(guard.usual) is expected


@pytest.mark.parametrize(
    ("norm", "others", "usual"),
    [
        (1.0, [2.0, None, [1.0, 0.5]], True),
        (math.inf, [2.0], False),
        (1.0, [math.nan], False),
        (1.0, [2.0, [1.0, math.inf]], False),
    ],
)
def test_a_lower_step_is_usual_where_all_is_finite(norm, others, usual):
    guard = late()
    values = [None if one is None else torch.tensor(one) for one in others]
    assert guard.lower(torch.tensor(norm), lambda: values)
    assert bool(guard.usual) is usual


@pytest.mark.parametrize(
    ("norm", "loss", "largest", "usual"),
    [
        (1.0, 1.0, None, True),
        (1.0, 1.0, 1.0, True),
        (1.1, 1.0, 1.0, False),
        (math.nan, 1.0, None, False),
        (math.nan, 1.0, math.inf, False),
        (1.0, math.inf, math.inf, False),
    ],
)
def test_a_hypergradient_is_usual_where_it_is_finite_and_not_too_large(norm, loss, largest, usual):
    guard = late(largest=None if largest is None else torch.tensor(largest, dtype=torch.float64))
    guard.upper(torch.tensor(norm), torch.tensor(loss))
    assert bool(guard.usual) is usual


@pytest.mark.parametrize("expected", [True, False])
@pytest.mark.parametrize("found", [True, False])
@pytest.mark.parametrize("dropped", [True, False])
def test_weights_of_one_are_what_was_expected(expected, found, dropped):
    guard = late(all_one=expected)
    assert guard.weights(flag(found), flag(dropped)) == [expected, False]
    # Weights that are 1 and not expected to be are multiplied, which is right, too.
    assert bool(guard.usual) is (not dropped and (found or not expected))


@pytest.mark.parametrize("usual", [True, False])
def test_a_state_is_the_new_one_or_the_old_one(usual):
    same = torch.zeros(2)
    old = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3), "same": same, "none": None}
    new = {"w": torch.tensor([math.nan, 5.0]), "n": torch.tensor(4), "same": same, "none": None}
    before = counts(old)
    found = kept(flag(usual), new, old)
    expected = [math.nan, 5.0] if usual else [1.0, 2.0]
    torch.testing.assert_close(found["w"], torch.tensor(expected), equal_nan=True)
    assert old["w"].tolist() == [1.0, 2.0]
    assert found["same"] is same
    assert int(found["n"]) == 4
    assert [int(one) for one in before] == [3]
    assert int(with_counts(found, before)["n"]) == 3
    assert not is_count(torch.tensor([3]))
    assert not is_count(torch.tensor(3.0))


def problem():
    def losses(params, batch):
        out = torch.nn.functional.linear(batch["x"], params["w"], params["b"])
        return out.square().mean(-1), None

    def weights(phi, batch, features):
        return torch.sigmoid(phi["raw"])[batch["i"]]

    def upper(params, phi, batch):
        return torch.nn.functional.linear(batch["x"], params["w"], params["b"]).square().mean()

    return ReweightingProblem(losses, weights, upper)


def data(number, bad=False):
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    return {"x": x * math.nan if bad else x, "i": torch.tensor([0, 1])}


@pytest.mark.parametrize(
    "optimizer", [AdamW(0.1), Adam(0.1, weight_decay=0.1), SGD(0.1, momentum=0.9)]
)
@pytest.mark.parametrize("bad", ["lower", "upper", "none"])
def test_a_step_in_place_moves_all_or_nothing(optimizer, bad):
    def made():
        generator = torch.Generator().manual_seed(5)
        theta = {
            "w": torch.randn(3, 4, generator=generator, dtype=torch.float64),
            "b": torch.zeros(3, dtype=torch.float64),
        }
        solver = ResidentSolver(
            problem(), optimizer, SGD(0.1), OneStep(Ghost(), order="upper-first")
        )
        phi = {"raw": torch.tensor([0.3, -0.2], dtype=torch.float64)}
        state = solver.init(theta, phi)
        return solver, solver.advance(state, [[data(1)]], data(2))[0]

    (solver, looked), (_, state) = made(), made()
    old = tree.map(torch.clone, state)
    guard = late()
    batches = [[data(3, bad == "lower")]], data(4, bad == "upper")
    new, _ = solver.advance(state, *batches, guard=guard)
    new = kept(guard.usual, new, state)
    assert bool(guard.usual) is (bad == "none")
    expected = old if bad != "none" else solver.advance(looked, *batches)[0]
    for name, leaf in tree.flatten(with_counts(new, counts(expected))).items():
        assert torch.equal(leaf, tree.flatten(expected)[name]), name
