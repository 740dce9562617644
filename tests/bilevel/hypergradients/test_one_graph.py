"""A window through one graph: the steps of the loop, the hypergradient of the sweep."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from bilevel import (
    SGD,
    Adam,
    AdamW,
    BilevelProblem,
    BilevelSolver,
    OneStep,
    Reverse,
    ReweightingProblem,
    Unrolled,
    tree,
)
from bilevel.hypergradients import one_graph
from tests.bilevel.optimizer_cases import OPTIMIZERS

F64 = torch.float64
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
    """Counts the windows that went through one graph."""
    went = []
    original = one_graph._taken

    def counted(*args):
        result = original(*args)
        went.extend([1] * (result is not None))
        return result

    monkeypatch.setattr(one_graph, "_taken", counted)
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


def equal_infos(found, expected):
    """Whether all that is known of the lower steps has the same bits."""
    for one, other in zip(found, expected, strict=True):
        assert (one.notes, one.lower_aux) == (other.notes, other.lower_aux)
        for name in ("lower_loss", "lower_grad_norm", "lower_clipped", "losses", "weights"):
            left, right = getattr(one, name), getattr(other, name)
            assert left is right or (torch.equal(left, right) and left.dtype == right.dtype), name


@pytest.mark.parametrize("problem", [SCALAR, PER_EXAMPLE], ids=["scalar", "per example"])
@pytest.mark.parametrize("optimizer", [SGD(0.1), Adam(0.01, max_norm=0.5)], ids=["sgd", "clipped"])
def test_what_is_known_of_the_steps_is_that_of_the_loop(problem, optimizer, through_graph):
    _, found = window(problem, Unrolled(), optimizer)
    _, expected = window(problem, Unrolled(product=Reverse()), optimizer)
    assert through_graph == [1]
    equal_infos(found, expected)
    torch.testing.assert_close(found[-1].upper_loss, expected[-1].upper_loss, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", [SGD(0.1), AdamW(0.05, max_norm=0.5)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("steps", [1, 3])
def test_one_step_goes_through_the_last_step_alone(optimizer, steps, through_graph):
    def taken(method):
        solver = BilevelSolver(SCALAR, optimizer, SGD(1.0), method, unroll_steps=steps)
        return solver.window(solver.init(THETA, PHI), [[X]] * steps, X)

    found, infos = taken(OneStep())
    assert through_graph == [1]
    expected, same = taken(OneStep(Reverse()))
    assert through_graph == [1]
    for one, other in zip(tree.leaves(found[0]), tree.leaves(expected[0]), strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(
        found.upper_params["a"], expected.upper_params["a"], rtol=1e-12, atol=1e-14
    )
    equal_infos(infos, same)
    cold = isinstance(optimizer, AdamW) and steps == 1
    assert any("cold" in note for note in infos[-1].notes) == cold


def test_order_average_and_rules_per_example_have_the_loop(through_graph):
    for method in (OneStep(order="upper-first"), OneStep(direction_decay=0.5)):
        window(SCALAR, method)
    window(PER_EXAMPLE, OneStep())
    assert not through_graph


def noisy_loss(theta, phi, batch):
    kept = functional.dropout(batch @ theta["w"], 0.5)
    return (phi["a"].exp() * (kept - 0.3).square().sum(1)).mean()


def test_random_numbers_are_those_of_the_loop(through_graph):
    """Also in the upper loss, which draws those of the last step."""

    def noisy_upper(theta, phi, batch):
        return functional.dropout(batch @ theta["w"], 0.5).cos().mean()

    problem = BilevelProblem(noisy_loss, noisy_upper)
    ends = []
    for method in (Unrolled(), Unrolled(product=Reverse())):
        torch.manual_seed(0)
        state, infos = window(problem, method)
        ends.append((state, infos[-1].upper_loss, torch.rand(3)))
    assert through_graph == [1]
    (found, loss, after), (expected, same_loss, same) = ends
    assert torch.equal(found.lower_params["w"], expected.lower_params["w"])
    assert torch.equal(after, same)
    assert torch.equal(loss, same_loss)
    torch.testing.assert_close(
        found.upper_params["a"], expected.upper_params["a"], rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_starts_the_window_again(value, through_graph):
    """The loop leaves it out and says so; the random numbers are those of a first attempt."""

    def broken_loss(theta, phi, batch):
        return noisy_loss(theta, phi, batch["x"]) * batch["factor"]

    def taken(method):
        torch.manual_seed(0)
        solver = BilevelSolver(
            BilevelProblem(broken_loss, upper_loss), SGD(0.1), SGD(1.0), method, unroll_steps=3
        )
        batches = [[{"x": X, "factor": factor}] for factor in (1.0, torch.tensor(value), 1.0)]
        state, infos = solver.window(solver.init(THETA, PHI), batches, X)
        return state, infos, torch.rand(3)

    found, infos, after = taken(Unrolled())
    expected, same, drawn = taken(Unrolled(product=Reverse()))
    assert not through_graph
    assert int(found.lower_skipped) == int(found.upper_skipped) == 1
    for one, other in zip(tree.leaves(found), tree.leaves(expected), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(after, drawn)
    assert [info.notes for info in infos] == [info.notes for info in same]


@pytest.mark.parametrize("kind", ["ignores", "constant weights"])
def test_what_calls_for_a_word_is_left_to_the_loop(kind, through_graph):
    problem = {
        "ignores": BilevelProblem(lambda theta, phi, batch: phi["a"].sum(), upper_loss),
        "constant weights": ReweightingProblem(
            PER_EXAMPLE.per_example_loss,
            lambda phi, batch, features: torch.ones(5, dtype=F64),
            upper_loss,
        ),
    }[kind]
    _, infos = window(problem, Unrolled())
    assert not through_graph
    notes = " ".join(note for info in infos for note in info.notes)
    assert {"ignores": "does not depend on the lower", "constant weights": "weights do not depend"}[
        kind
    ] in notes


def test_an_error_of_the_loss_is_the_users_own(through_graph):
    def fails(theta, phi, batch):
        raise RuntimeError("of the user")

    with pytest.raises(RuntimeError, match="of the user"):
        window(BilevelProblem(fails, upper_loss), Unrolled())
    assert not through_graph
