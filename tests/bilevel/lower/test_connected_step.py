"""A step with a graph: the values of `update`, the derivative of `vjp`, through several steps."""

from __future__ import annotations

import optree
import pytest
import torch

from bilevel import tree
from bilevel.lower.connected_step import connected_update, with_graph
from bilevel.optimizers.base import OptimizerState
from tests.bilevel.optimizer_cases import OPTIMIZERS

F64 = torch.float64


def draw(*shape):
    return torch.randn(*shape, dtype=F64)


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_values_and_derivative_are_those_of_the_optimizer(optimizer, unused):
    torch.manual_seed(0)
    params = {"a": draw(3, 2), "b": draw(4), "c": draw(1)}
    state = optimizer.init(params)
    for _ in range(2):
        grads = tree.map(torch.randn_like, params)
        params, state = optimizer.update(grads, state, params)
    grads = tree.map(torch.randn_like, params)
    grads["a"][0] = 0.0
    if unused:
        grads["c"] = None
    expected = optimizer.update(grads, state, params)
    inputs = with_graph(grads), *(with_graph(moment) for moment in state[1:]), with_graph(params)
    state_before = OptimizerState(state[0], *inputs[1:3])
    leaves, structure = optree.tree_flatten(inputs[3], none_is_leaf=True)
    flat = structure.flatten_up_to(inputs[0])
    moved, state_after = connected_update(optimizer, flat, state_before, leaves, structure)
    found = structure.unflatten(moved), state_after
    assert all(map(torch.equal, tree.leaves(found), tree.leaves(expected)))

    bars = (
        tree.map(torch.randn_like, expected[0]),
        tree.map(torch.randn_like, expected[1]._replace(steps=None)),
    )
    cotangents = optimizer.vjp(grads, state, params, bars[0], bars[1])
    outputs = tree.leaves((found[0], found[1]._replace(steps=None)))
    pulled = torch.autograd.grad(outputs, tree.leaves(inputs), tree.leaves(bars), allow_unused=True)
    wanted = tree.leaves((cotangents.grads, *cotangents.state[1:], cotangents.params))
    for one, other in zip(pulled, wanted, strict=True):
        one = torch.zeros_like(other) if one is None else one
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
