"""Copies of θ at the peak, by the allocator's own record."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bilevel import SGD, Adam, Auto, Dot, Ghost, OneStep, ResidentSolver, ReweightingProblem, tree
from tests.peak_bytes import peak_bytes

WIDTH, LAYERS = 512, 24


class Deep(nn.Module):
    """Many layers of the same size, so that a copy of θ is no multiple of the largest leaf."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean(-1)


def copies(method, batches, upper):
    """The most bytes alive at once in a step, θ and the moments included, over those of θ."""
    torch.manual_seed(0)
    module = Deep()

    def losses(params, batch):
        return torch.func.functional_call(module, params, (batch["x"],))

    problem = ReweightingProblem(
        lambda theta, batch: (losses(theta, batch), None),
        lambda phi, batch, features: phi[batch["i"]],
        lambda theta, phi, batch: losses(theta, batch).mean(),
    )
    theta = {name: leaf.detach() for name, leaf in module.named_parameters()}
    size = sum(leaf.nbytes for leaf in theta.values())
    rows = [{"x": torch.randn(n, WIDTH), "i": torch.arange(n)} for n in batches]
    solver = ResidentSolver(problem, Adam(1e-4), SGD(0.1), method, accumulation=len(rows))
    state = solver.init(theta, torch.linspace(0.5, 1.5, 8))
    state, _ = solver.advance(state, [rows], rows[0] if upper else None)  # rules are verified
    held = size + sum(leaf.nbytes for leaf in tree.leaves((state.lower_optimizer, state.memory)))
    return (
        held + peak_bytes(lambda: solver.advance(state, [rows], rows[0] if upper else None))
    ) / size


def averaged(route):
    return OneStep(route, "upper-first", direction_decay=0.9)


def held(route, **options):
    """The step that is measured uses the v of the step before it."""
    return OneStep(route, "upper-first", upper_gradient_every=2, **options)


CASES = {
    "plain, one example": (OneStep(Dot()), [1], False, 4),
    "plain, micro-batches of one": (OneStep(Dot(), "upper-first"), [1, 1, 1], False, 4),
    "plain, a batch": (OneStep(Auto(), "upper-first"), [4], False, 4),
    "dot, lower-first": (OneStep(Dot()), [1], True, 4),
    "dot, upper-first": (OneStep(Dot(), "upper-first"), [1], True, 5),
    "dot, upper-first, accumulation": (OneStep(Dot(), "upper-first"), [1, 1, 1], True, 5),
    "dot, average": (averaged(Dot()), [1, 1, 1], True, 6),
    "dot, held v": (held(Dot()), [1, 1, 1], True, 6),
    "dot, held average": (held(Dot(), direction_decay=0.9), [1, 1, 1], True, 6),
    "ghost": (OneStep(Ghost(), "upper-first"), [4], True, 5),
    "ghost, average": (averaged(Ghost()), [4], True, 6),
    "ghost, accumulation": (OneStep(Ghost(), "upper-first"), [4, 4], True, 6),
    "plain, batches": (OneStep(Auto(), "upper-first"), [4, 4], False, 5),
}


@pytest.mark.parametrize(("method", "batches", "upper", "expected"), CASES.values(), ids=CASES)
def test_copies_of_the_parameters_at_the_peak(method, batches, upper, expected):
    """Beside them a few leaves, activations, and what a part holds."""
    found = copies(method, batches, upper)
    assert expected - 0.2 < found < expected + 0.35
