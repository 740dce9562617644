"""A part that is recomputed with other parameters is refused, any other recomputation is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from bilevel import (
    SGD,
    Auto,
    BilevelProblem,
    BilevelSolver,
    CentralDifference,
    Dot,
    Ghost,
    Implicit,
    Jvp,
    OneStep,
    Penalty,
    PerExample,
    Reverse,
    ReweightingProblem,
    Unrolled,
)

ROUTES = [OneStep(route) for route in (Auto(), Dot(), Jvp(), Reverse(), CentralDifference())]
ROUTES += [OneStep(PerExample()), OneStep(Ghost(), order="upper-first")]
OTHERS = [Unrolled(), Unrolled(product=Reverse()), Implicit(product=Reverse()), Penalty(1.0)]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.frozen = nn.Linear(3, 8), nn.Linear(8, 1), nn.Linear(8, 8)

    def forward(self, x):
        return checkpoint(self.part, x, use_reentrant=False)

    def part(self, x):
        return self.b(torch.tanh(self.frozen(torch.tanh(self.a(x))))).squeeze(1)


def reweighting(call):
    return ReweightingProblem(
        lambda t, b: (call(t, b) ** 2, None),
        lambda p, b, _: torch.exp(p["r"][: len(b)]),
        lambda t, p, b: (b @ t["a.weight"].T).mean(),
    )


def step(problem, method, params, size=4):
    size = 1 if "Dot" in str(method) else size
    solver = BilevelSolver(problem, SGD(0.1), SGD(0.1), method)
    state = solver.init(params, {"r": torch.zeros(4)})
    return solver.step(state, [torch.randn(size, 3)], torch.randn(4, 3))


@pytest.mark.parametrize("method", [*ROUTES, *OTHERS], ids=str)
def test_a_checkpoint_inside_functional_call_is_refused(method):
    net = Net()
    problem = reweighting(lambda t, b: functional_call(net, t, (b,)))
    with pytest.raises((RuntimeError, ValueError), match=r"bilevel\.functional\(module\)") as error:
        step(problem, method, dict(net.named_parameters()))
    assert "activation checkpointing" in str(error.value)


@pytest.mark.parametrize("method", [OneStep(), OneStep(Reverse()), Unrolled()], ids=str)
def test_so_it_is_in_a_bilevel_problem(method):
    net = Net()
    problem = BilevelProblem(
        lambda t, p, b: (functional_call(net, t, (b,)) ** 2).mean() * p["r"].exp().sum(),
        lambda t, p, b: t["a.weight"].sum(),
    )
    with pytest.raises(RuntimeError, match=r"bilevel\.functional\(module\)"):
        step(problem, method, dict(net.named_parameters()))


def test_so_it_is_where_the_module_itself_is_frozen():
    """Its own parameters do not require grad, so torch finds other tensors saved."""
    net = Net()
    params = {name: leaf.detach().clone() for name, leaf in net.named_parameters()}
    net.requires_grad_(False)
    problem = reweighting(lambda t, b: functional_call(net, t, (b,)))
    with pytest.raises(RuntimeError, match=r"bilevel\.functional\(module\)"):
        step(problem, OneStep(), params)


def test_reentrant_checkpointing_is_refused():
    w = {"a.weight": torch.randn(3, 3)}

    def call(t, x):
        return checkpoint(lambda x: x @ t["a.weight"], x * t["a.weight"].sum(), use_reentrant=True)

    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        step(reweighting(lambda t, b: call(t, b).sum(1)), OneStep(Jvp()), w)


@pytest.mark.parametrize("method", [OneStep(), OneStep(Jvp()), OneStep(Reverse())], ids=str)
def test_frozen_parameters_and_the_parameters_of_the_call_may_be_recomputed(method):
    """The frozen ones require grad, as those of a module that nobody has frozen by name."""
    net = Net()
    params = {n: leaf for n, leaf in net.named_parameters() if not n.startswith("frozen")}

    def call(t, x):
        def part(x):
            h = torch.tanh(x @ t["a.weight"].T + t["a.bias"])
            return (torch.tanh(net.frozen(h)) @ t["b.weight"].T + t["b.bias"]).squeeze(1)

        return checkpoint(part, x, use_reentrant=False)

    def plain(t, x):
        return functional_call(net, t, (x,))

    torch.manual_seed(0)
    state, _ = step(reweighting(call), method, params)
    net.forward = net.part
    torch.manual_seed(0)
    expected, _ = step(reweighting(plain), method, params)
    for level in (0, 1):
        for name, leaf in expected[level].items():
            torch.testing.assert_close(state[level][name], leaf)
