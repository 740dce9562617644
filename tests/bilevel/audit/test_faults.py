"""Faults put in on purpose: the audit disagrees, and says which half is wrong."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bilevel import (
    SGD,
    BilevelProblem,
    BilevelSolver,
    Implicit,
    Jvp,
    OneStep,
    Reverse,
    ReweightingProblem,
    Unrolled,
    check_hypergradient,
    functional,
)
from bilevel.audit.lower_gradient import plain_gradient, slope_error
from bilevel.autodiff import random_state
from bilevel.autodiff.gradient import as_leaves
from bilevel.lower.micro_batch import Backward, weighted_batch

LOWER = "the lower gradient itself"
UPPER = "the lower gradient is right, the hypergradient is wrong"


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 1)

    def forward(self, x):
        return checkpoint(self.part, x, use_reentrant=False)

    def part(self, x):
        return torch.tanh(self.b(torch.tanh(self.a(x)))).squeeze(1)


def table(call):
    return ReweightingProblem(
        lambda t, b: (call(t, b) ** 2, None),
        lambda p, b, _: torch.exp(p["r"]),
        lambda t, p, b: (call(t, b) - 1).square().mean(),
    )


def audited(problem, method, params, phi, batch):
    solver = BilevelSolver(problem, SGD(0.3), SGD(1.0), method)
    state = solver.init(params, phi)
    return check_hypergradient(solver, state, [batch], batch, directions=2)


IMPLICIT = Implicit(product=Reverse(), stationarity_tolerance=None)
METHODS = [OneStep(), OneStep(Jvp()), OneStep(Reverse()), Unrolled(), IMPLICIT]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_part_recomputed_with_other_parameters(method):
    net = Net()
    params = {name: leaf + 0.3 for name, leaf in net.named_parameters()}
    phi, batch = {"r": torch.zeros(4)}, torch.randn(4, 3)
    problem = table(lambda t, b: functional_call(net, t, (b,)))
    check = audited(problem, method, params, phi, batch)
    assert check.outcome == "disagrees"
    assert LOWER in check.message
    assert "bilevel.functional(module)" in check.message
    f = functional(net)
    check = audited(table(f), method, params, phi, batch)
    assert check.outcome == ("approximates" if isinstance(method, Implicit) else "agrees")
    assert check.lower_slope_error < 1e-7


@pytest.mark.parametrize("method", [OneStep(Jvp()), OneStep(Reverse()), Unrolled()], ids=str)
def test_a_recomputation_that_nothing_but_the_loss_itself_can_tell(method):
    """Weights in a place of the user's own, put back before the backward pass: no Parameter."""
    place = {"w": torch.randn(3, requires_grad=True)}

    def call(t, x):
        own = place["w"]
        place["w"] = t["w"]
        out = checkpoint(lambda x: torch.tanh(x @ place["w"]), x * t["s"], use_reentrant=False)
        place["w"] = own
        return out

    params = {"w": torch.randn(3), "s": torch.ones(3)}
    batch, phi = torch.randn(4, 3), {"r": torch.zeros(4)}
    check = audited(table(call), method, params, phi, batch)
    assert check.outcome == "disagrees"
    assert check.lower_gradient_error < 1e-9  # plain autograd recomputes it in the same way
    assert check.lower_slope_error > 0.01
    assert "with plain autograd too" in check.message


@dataclass(frozen=True)
class ConstantTakenForTheBatch(Jvp):
    """Weights the rows of ``d`` by example, as if the constant it is added to were the batch."""

    def backward_pass(self, context, total):
        return partial(self._backward, context)

    def _backward(self, context, batch, random):
        params = as_leaves(context.lower_params)
        losses, features = context.problem.losses(params, batch)
        weights = context.problem.weights_of(context.upper_params, batch, features, losses)
        (grad,) = torch.autograd.grad(losses.mean(), [params["d"]])
        grads = {"d": weights.detach()[:, None] * grad}
        return Backward(grads, weighted_batch(batch, random, losses, weights))


def test_a_constant_taken_for_the_batch():
    frozen, out = torch.randn(4, 3), torch.randn(1, 4)

    def call(t, b):
        return (torch.tanh(F.linear(b, frozen + t["d"])) @ out.T).squeeze(1)

    phi, batch = {"r": torch.randn(4)}, torch.randn(4, 3)
    params = {"d": 0.1 * torch.randn(4, 3)}
    check = audited(table(call), OneStep(ConstantTakenForTheBatch()), params, phi, batch)
    assert check.outcome == "disagrees"
    assert min(check.lower_gradient_error, check.lower_slope_error) > 0.05
    assert LOWER in check.message
    assert audited(table(call), OneStep(Jvp()), params, phi, batch)


@dataclass(frozen=True)
class NoGradIgnored(Reverse):
    """Differentiates the loss as if ``torch.no_grad`` were not there."""

    ignoring: Any = None

    def gradient_derivative(self, request):
        problem = replace(request.problem, lower_loss=self.ignoring)
        return super().gradient_derivative(replace(request, problem=problem))


def test_no_grad_ignored_by_the_product():
    def loss(t, p, b, ignored):
        z = torch.tanh(b @ t["w"])
        with torch.set_grad_enabled(ignored):
            y = torch.tanh(2 * z)
        return (torch.exp(p["a"]) * (z - y) ** 2).mean()

    problem = BilevelProblem(partial(loss, ignored=False), lambda t, p, b: (b @ t["w"]).sum())
    params, phi, batch = {"w": torch.randn(3, 2)}, {"a": torch.zeros(2)}, torch.randn(8, 3)
    wrong = NoGradIgnored(partial(loss, ignored=True))
    check = audited(problem, OneStep(wrong), params, phi, batch)
    assert check.outcome == "disagrees"
    assert max(check.lower_gradient_error, check.lower_slope_error) < 1e-6
    assert UPPER in check.message
    assert audited(problem, OneStep(Reverse()), params, phi, batch)


@dataclass(frozen=True)
class ExamplesTakenApart(Jvp):
    """Weights the gradients of the features' rows, as rules per example do."""

    def backward_pass(self, context, total):
        return partial(self._backward, context)

    def _backward(self, context, batch, random):
        params = as_leaves(context.lower_params)
        hidden = F.linear(batch, params["w"].detach()).requires_grad_()
        losses = normalised(hidden)
        weights = context.problem.weights_of(context.upper_params, batch, None, losses)
        (b,) = torch.autograd.grad(losses.mean(), [hidden])
        grads = {"w": (weights.detach()[:, None] * b).T @ batch}
        return Backward(grads, weighted_batch(batch, random, losses, weights))


def normalised(hidden):
    return (F.batch_norm(hidden, None, None, training=True) ** 3).sum(1)


def test_examples_that_interact_taken_apart():
    problem = ReweightingProblem(
        lambda t, b: (normalised(F.linear(b, t["w"])), None),
        lambda p, b, _: torch.exp(p["r"]),
        lambda t, p, b: F.linear(b, t["w"]).square().mean(),
    )
    params, phi, batch = {"w": torch.randn(2, 3)}, {"r": torch.randn(5)}, torch.randn(5, 3)
    check = audited(problem, OneStep(ExamplesTakenApart()), params, phi, batch)
    assert check.outcome == "disagrees"
    assert min(check.lower_gradient_error, check.lower_slope_error) > 0.05
    assert LOWER in check.message
    assert audited(problem, OneStep(Jvp()), params, phi, batch)


@pytest.mark.parametrize(
    ("dtype", "wrong"),
    [
        (torch.float64, 0.0),
        (torch.float64, 0.5),
        (torch.float32, 0.0),
        (torch.float32, 0.5),
        (torch.bfloat16, 0.0),
    ],
)
def test_the_slopes_of_the_loss_tell_a_wrong_gradient(dtype, wrong):
    torch.manual_seed(1)
    params = {"w": torch.randn(6, 5).to(dtype), "unused": torch.ones(2, dtype=dtype)}
    batches = [torch.randn(size, 6).to(dtype) for size in (4, 7)]
    problem = BilevelProblem(
        lambda t, p, b: torch.tanh(b @ t["w"]).square().mean(),
        lambda t, p, b: t["w"].sum(),
        batch_size=len,
    )
    grads = plain_gradient(problem, params, {}, batches)
    assert grads["unused"] is None
    torch.manual_seed(2)
    grads["w"] = grads["w"] + wrong * grads["w"].norm() / 30**0.5 * torch.randn(6, 5).to(dtype)
    found = slope_error(problem, params, {}, batches, random_state.capture(params), grads)
    tolerance = {torch.float64: 1e-6, torch.float32: 2e-2, torch.bfloat16: 0.2}[dtype]
    assert (found > tolerance) == (wrong > 0.0), found


def test_a_loss_less_precise_than_its_parameters_is_not_taken_for_wrong():
    torch.manual_seed(1)
    params, batch = {"w": torch.randn(6, 5)}, torch.randn(8, 6)
    for inner in (torch.float32, torch.bfloat16):

        def loss(t, p, b, inner=inner):
            return torch.tanh(b.to(inner) @ t["w"].to(inner)).square().mean()

        problem = BilevelProblem(loss, lambda t, p, b: t["w"].sum())
        grads = plain_gradient(problem, params, {}, [batch])
        random = random_state.capture(params)
        assert slope_error(problem, params, {}, [batch], random, grads) < 1e-2
        wrong = {"w": 2 * grads["w"]}
        assert slope_error(problem, params, {}, [batch], random, wrong) > 0.3
