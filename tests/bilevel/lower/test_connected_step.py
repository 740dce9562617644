"""A step with a graph: the values of `update`, the derivative of `vjp`, through several steps."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from bilevel import (
    SGD,
    Adagrad,
    Adam,
    AdamW,
    BilevelProblem,
    BilevelSolver,
    NAdam,
    Reverse,
    ReweightingProblem,
    RMSProp,
    Unrolled,
    tree,
)
from bilevel.hypergradients.unrolled import UnrolledRecord
from bilevel.lower.connected_step import connected_update, with_graph
from bilevel.optimizers.base import OptimizerState

F64 = torch.float64
OPTIMIZERS = {
    "sgd": SGD(0.1, weight_decay=0.1),
    "momentum": SGD(0.1, momentum=0.9, nesterov=True),
    "clip held": SGD(0.1, momentum=0.9, max_norm=0.5),
    "clip differentiated": SGD(0.1, max_norm=0.5, differentiate_clip=True),
    "adam": Adam(0.01, weight_decay=0.1, max_norm=0.5),
    "adamw": AdamW(0.01, weight_decay=0.1, decay_mask=lambda name: name != "b"),
    "groups": AdamW({"a": 0.1, "b": 0.2, "c": 0.3}, group=lambda name: name),
    "rmsprop": RMSProp(0.01),
    "adagrad": Adagrad(0.01),
    "nadam": NAdam(0.01),
}


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
    found = connected_update(
        optimizer, inputs[0], OptimizerState(state[0], *inputs[1:3]), inputs[3]
    )
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


THETA = {"w": torch.linspace(-1, 1, 6, dtype=F64).view(3, 2), "idle": torch.ones(2, dtype=F64)}
PHI = {"a": torch.linspace(0, 1, 5, dtype=F64)}
X = torch.linspace(-2, 2, 15, dtype=F64).sin().view(5, 3)


def losses(theta, batch):
    return (torch.tanh(batch @ theta["w"]) - 0.3).square().sum(1)


def upper_loss(theta, phi, batch):
    return (batch @ theta["w"]).cos().mean() + phi["a"].square().sum()


SCALAR = BilevelProblem(
    lambda theta, phi, batch: (phi["a"].exp() * losses(theta, batch)).mean(), upper_loss
)
PER_EXAMPLE = ReweightingProblem(
    lambda theta, batch: (losses(theta, batch), losses(theta, batch)),
    lambda phi, batch, features: phi["a"].exp() + 0.1 * features,
    upper_loss,
)


def window(problem, method, optimizer=Adam(0.05), **more):  # noqa: B008
    solver = BilevelSolver(problem, optimizer, SGD(1.0), method, unroll_steps=3, **more)
    return solver.window(solver.init(THETA, PHI), [[X]] * 3, X)


@pytest.fixture
def through_graph(monkeypatch):
    """Counts the windows whose derivative went through one graph."""
    went = []
    original = UnrolledRecord._through_graph

    def counted(*args):
        result = original(*args)
        went.append(1)
        return result

    monkeypatch.setattr(UnrolledRecord, "_through_graph", counted)
    return went


@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("problem", [SCALAR, PER_EXAMPLE], ids=["scalar", "per example"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_one_graph_gives_what_the_sweep_gives(problem, attached, optimizer, steps, through_graph):
    """The sweep, which tests hold against differences, recomputes every step by itself."""
    if optimizer.group is not None:
        optimizer = AdamW({"w": 0.1, "idle": 0.2}, group=lambda name: name)
    if attached and problem is PER_EXAMPLE:
        problem = ReweightingProblem(
            problem.per_example_loss, problem.weights, upper_loss, detach_features=False
        )
    found, infos = window(problem, Unrolled(steps), optimizer)
    assert through_graph == [1]
    expected, same = window(problem, Unrolled(steps, product=Reverse()), optimizer)
    assert through_graph == [1]
    for name, leaf in expected.lower_params.items():
        assert torch.equal(found.lower_params[name], leaf)
        assert not found.lower_params[name].requires_grad
    torch.testing.assert_close(
        found.upper_params["a"], expected.upper_params["a"], rtol=1e-12, atol=1e-14
    )
    assert [info.notes for info in infos] == [info.notes for info in same]


def test_micro_batches_and_learned_numbers_are_swept(through_graph):
    solver = BilevelSolver(SCALAR, SGD(0.1), SGD(1.0), Unrolled(), unroll_steps=2, accumulation=2)
    solver.window(solver.init(THETA, PHI), [[X, X]] * 2, X)
    window(
        SCALAR, Unrolled(), SGD(0.1), hyperparameters=lambda phi: {"lr": 0.1 * phi["a"][0].exp()}
    )
    window(SCALAR, Unrolled(replay=1))
    window(SCALAR, Unrolled(store="host"))
    assert not through_graph


def test_a_start_that_depends_on_phi_gets_its_part(through_graph):
    initial = lambda phi: {"w": THETA["w"] + phi["a"].sum(), "idle": THETA["idle"]}  # noqa: E731
    found, _ = window(SCALAR, Unrolled(), initial=initial)
    expected, _ = window(SCALAR, Unrolled(product=Reverse()), initial=initial)
    assert through_graph == [1]
    torch.testing.assert_close(
        found.upper_params["a"], expected.upper_params["a"], rtol=1e-12, atol=1e-14
    )


def test_an_operation_that_comes_up_at_a_later_step_cuts_the_graph(through_graph):
    """The gradient of SiLU has other bits with a graph: here the window is swept, by hand not."""

    def lower_loss(theta, phi, batch):
        turn = functional.silu if batch["silu"] else torch.tanh
        return (phi["a"].exp() * (turn(X @ theta["w"]) - batch["y"]).square().sum(1)).mean()

    problem = BilevelProblem(lower_loss, upper_loss)
    batches = [
        {"silu": number == 1, "y": torch.full((5, 2), 0.3, dtype=F64)} for number in range(3)
    ]
    solver = BilevelSolver(problem, SGD(0.1), SGD(1.0), Unrolled(), unroll_steps=3)
    state, _ = solver.window(solver.init(THETA, PHI), [[batch] for batch in batches], X)
    assert not through_graph
    phi = {"a": PHI["a"].clone().requires_grad_()}
    theta = {"w": THETA["w"].clone().requires_grad_()}
    for batch in batches:
        loss = lower_loss(theta, phi, batch)
        (grad,) = torch.autograd.grad(loss, [theta["w"]], create_graph=True)
        theta = {"w": theta["w"] - 0.1 * grad}
    (expected,) = torch.autograd.grad(upper_loss(theta, phi, X), [phi["a"]])
    torch.testing.assert_close(state.upper_params["a"], PHI["a"] - expected, rtol=1e-12, atol=1e-14)
