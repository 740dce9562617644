"""Projected steps."""

from __future__ import annotations

import torch

from bilevel import SGD, Adam, Projected, tree


def test_projected_descent_reaches_the_constrained_minimum() -> None:
    """min ½‖x − t‖² over the box [0, 1]³ is t clamped, reached exactly."""
    target = torch.tensor([-2.0, 0.25, 7.0], dtype=torch.float64)
    optimizer = Projected(SGD(0.5), lambda x: tree.map(lambda leaf: leaf.clamp(0.0, 1.0), x))
    params = {"x": torch.full((3,), 0.5, dtype=torch.float64)}
    state = optimizer.init(params)
    for _ in range(60):
        params, state = optimizer.update({"x": params["x"] - target}, state, params)
    torch.testing.assert_close(params["x"], target.clamp(0.0, 1.0), rtol=0, atol=1e-15)


def test_a_parameter_pushed_past_the_edge_comes_back_at_once() -> None:
    """After ten steps outwards one step inwards moves it inside; unprojected it takes ten."""
    push, pull = {"x": torch.tensor([-1.0])}, {"x": torch.tensor([1.0])}
    free, held = SGD(1.0), Projected(SGD(1.0), lambda x: {"x": x["x"].clamp(0.0, 2.0)})
    values = []
    for optimizer in (free, held):
        params = {"x": torch.tensor([1.0])}
        state = optimizer.init(params)
        for _ in range(10):
            params, state = optimizer.update(push, state, params)
        params, state = optimizer.update(pull, state, params)
        values.append(params["x"].item())
    assert values == [10.0, 1.0]


def test_inside_the_set_nothing_changes() -> None:
    """With a projection that is the identity here, steps and state are the optimizer's own."""
    params, grads = {"x": torch.randn(4)}, {"x": torch.randn(4)}
    plain, held = Adam(0.1, max_norm=0.3), Projected(Adam(0.1, max_norm=0.3), lambda x: x)
    assert held.max_norm == 0.3
    assert Projected(SGD(0.1), lambda x: x).max_norm is None
    expected = plain.update(grads, plain.init(params), params)
    found = held.update(grads, held.init(params), params)
    for name, leaf in tree.flatten(expected).items():
        assert torch.equal(leaf, tree.flatten(found)[name])
