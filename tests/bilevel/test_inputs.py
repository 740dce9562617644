"""What is handed over by mistake gets one sentence that says what to hand over."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from bilevel import (
    SGD,
    Adam,
    BilevelProblem,
    BilevelSolver,
    ConjugateGradient,
    Implicit,
    Jvp,
    OneStep,
    PerExample,
    ReweightingProblem,
    Unrolled,
    check_hypergradient,
    fit,
    functional,
)

PROBLEM = BilevelProblem(
    lambda t, p, b: ((b @ t["w"]) ** 2 * torch.exp(p["a"])).mean(),
    lambda t, p, b: (b @ t["w"]).mean(),
)
SOLVER = BilevelSolver(PROBLEM, SGD(0.1), SGD(1.0))


def start(solver=SOLVER):
    return solver.init({"w": torch.ones(3, 1)}, {"a": torch.tensor(0.0)})


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclass
class Row:
    x: torch.Tensor


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("batch", "kind"),
    [
        (X, "Tensor"),
        ({"x": X}, "dict"),
        (UserDict(x=X), "UserDict"),
        (Pair(X, X), "Pair"),
        (Row(X), "Row"),
        ("text", "str"),
    ],
)
def test_a_batch_where_its_list_is_meant(batch, kind):
    sentence = (
        rf"lower_batches: expected a list of micro-batches, found a {kind}; .*\[lower_batches\]"
    )
    with pytest.raises(TypeError, match=sentence):
        SOLVER.step(start(), batch, X)
    window = BilevelSolver(PROBLEM, SGD(0.1), SGD(1.0), Unrolled())
    with pytest.raises(TypeError, match=sentence):
        window.window(start(window), [batch], X)
    with pytest.raises(TypeError, match=rf"batches: .*each a list.*found a {kind}"):
        window.window(start(window), batch, X)


def test_a_tuple_of_two_is_told_from_two_micro_batches_by_its_number():
    with pytest.raises(ValueError, match=r"accumulation=1 micro-batches, found 2; if this is one"):
        SOLVER.step(start(), (X, X), X)
    with pytest.raises(ValueError, match=r"expected accumulation=1 micro-batches, found 0"):
        SOLVER.step(start(), [], X)


def test_what_is_due_is_drawn_from_an_iterator():
    rows = torch.arange(30.0).view(10, 3) / 30.0
    loader = DataLoader(rows, batch_size=2)
    lists = [[batch] for batch in loader]
    for method in (OneStep(), Unrolled()):
        solver = BilevelSolver(PROBLEM, SGD(0.1), SGD(1.0), method, unroll_steps=2)
        batches = iter(loader)
        state, _ = solver.window(start(solver), batches, X)
        state, _ = solver.window(state, batches, X)
        state, _ = solver.step(state, batches)
        expected, _ = solver.window(start(solver), lists[:2], X)
        expected, _ = solver.window(expected, lists[2:4], X)
        expected, _ = solver.step(expected, lists[4])
        assert int(state.lower_steps) == 5
        assert torch.equal(state.lower_params["w"], expected.lower_params["w"])
        assert torch.equal(state.upper_params["a"], expected.upper_params["a"])


def test_micro_batches_of_a_step_are_drawn_in_their_number():
    parts = [torch.full((2, 3), float(number)) for number in range(4)]
    solver = BilevelSolver(PROBLEM, SGD(0.1), SGD(1.0), Unrolled(), unroll_steps=2, accumulation=2)
    expected, _ = solver.window(start(solver), [parts[:2], parts[2:]], X)
    for batches in (iter(parts), [iter(parts[:2]), iter(parts[2:])]):
        state, _ = solver.window(start(solver), batches, X)
        assert torch.equal(state.upper_params["a"], expected.upper_params["a"])
    check = check_hypergradient(solver, start(solver), iter(parts), X, directions=1)
    assert (
        check.outcome
        == check_hypergradient(
            solver, start(solver), [parts[:2], parts[2:]], X, directions=1
        ).outcome
    )


def test_an_iterator_that_ends_and_a_loader_without_one():
    with pytest.raises(ValueError, match=r"iterator with 1 more micro-batches, found 0; start a"):
        SOLVER.step(start(), iter([]), X)
    solver = BilevelSolver(PROBLEM, SGD(0.1), SGD(1.0), Unrolled(), unroll_steps=3)
    with pytest.raises(ValueError, match=r"batches: .* 3 more micro-batches, found 2; start a new"):
        solver.window(start(solver), (part for part in [X, X]), X)
    loader = DataLoader([1, 2])
    for call in (SOLVER.window, SOLVER.step):
        with pytest.raises(TypeError, match=r"found a DataLoader.*give iter\(loader\)"):
            call(start(), loader, X)


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        (nn.Linear(2, 2), "found the module Linear; give f.params of f = bilevel.functional"),
        (nn.Linear(2, 2).parameters(), "found a generator; give f.params"),
        ({"w": 1.0}, r"'w' is a float; expected a tensor, such as torch.tensor\(1.0\)"),
        ({"w": [[1.0]]}, r"'w/0/0' is a float"),
        ({"net": nn.Linear(2, 2)}, "'net' is a Linear; expected a tensor"),
    ],
)
@pytest.mark.parametrize("level", ["lower_params", "upper_params"])
def test_what_is_no_tree_of_tensors(level, params, sentence):
    good = {"w": torch.ones(1)}
    given = {"lower_params": good, "upper_params": good, level: params}
    with pytest.raises(TypeError, match=f"{level}: .*{sentence}"):
        SOLVER.init(**given)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((PROBLEM, torch.optim.SGD([torch.ones(1)], 0.1), SGD(1.0)), "lower_optimizer is torch"),
        ((PROBLEM, SGD(1.0), torch.optim.Adam([torch.ones(1)])), r"torch\.optim\.Adam.*bilevel"),
        ((PROBLEM, Adam, SGD(1.0)), r"the class Adam; give an optimizer, such as Adam\("),
        ((PROBLEM, 0.1, SGD(1.0)), r"must have init and update.*found 0\.1"),
        ((PROBLEM, SGD(0.1), SGD(1.0), Jvp()), r"is the route Jvp\(\); give OneStep\(Jvp\(\)\)"),
        ((PROBLEM, SGD(0.1), SGD(1.0), OneStep), r"is the class OneStep; give OneStep\("),
        ((PROBLEM, SGD(0.1), SGD(1.0), "one-step"), r"must be OneStep\(...\).*found 'one-step'"),
        (((1, 2), SGD(0.1), SGD(1.0)), r"problem must be a BilevelProblem.*found \(1, 2\)"),
    ],
)
def test_what_is_no_part_of_a_solver(arguments, sentence):
    with pytest.raises(TypeError, match=sentence):
        BilevelSolver(*arguments)


def reweighting(per_example, weights=lambda p, b, f: torch.exp(p["a"]) * torch.ones(2)):
    problem = ReweightingProblem(per_example, weights, PROBLEM.upper_loss)
    return BilevelSolver(problem, SGD(0.1), SGD(1.0))


@pytest.mark.parametrize("route", [OneStep(), OneStep(Jvp()), Unrolled()], ids=str)
def test_a_forgotten_tuple(route):
    problem = ReweightingProblem(
        lambda t, b: (b @ t["w"]).squeeze(1), lambda p, b, f: p["a"] * torch.ones(2), None
    )
    solver = BilevelSolver(problem, SGD(0.1), SGD(1.0), route)
    with pytest.raises(ValueError, match=r"found a Tensor; return \(losses, None\)"):
        solver.step(start(solver), [X], X)


def test_weights_that_are_no_tensor():
    solver = reweighting(lambda t, b: ((b @ t["w"]).squeeze(1), None), lambda p, b, f: [1.0, 1.0])
    with pytest.raises(ValueError, match=r"weights: expected one per loss.*found a list"):
        solver.step(start(solver), [X], X)


def test_the_state_owns_its_tensors():
    net = nn.Linear(3, 1)
    phi = {"a": torch.tensor(0.0)}
    state = SOLVER.init(dict(net.named_parameters()), phi)
    before = state.lower_params["weight"].clone()
    net.load_state_dict({name: leaf + 1 for name, leaf in net.state_dict().items()})
    phi["a"].add_(1.0)
    assert torch.equal(state.lower_params["weight"], before)
    assert float(state.upper_params["a"]) == 0.0


@dataclass
class Tokens:
    ids: torch.Tensor


@pytest.mark.parametrize("wrap", [lambda ids: UserDict(ids=ids), Tokens], ids=["mapping", "object"])
def test_token_ids_in_a_batch_of_any_kind_have_the_examples_in_front(wrap):
    """Two rows of a table of two, so that their number alone does not tell what they are."""
    torch.manual_seed(0)
    embedding = nn.Embedding(2, 3, dtype=torch.float64)
    f = functional(embedding)

    def ids(batch):
        return batch.ids if isinstance(batch, Tokens) else batch["ids"]

    def losses(t, b):
        return f(t, ids(b)).square().sum((1, 2)), None

    def solver(route):
        problem = ReweightingProblem(
            losses, lambda p, b, _: torch.exp(p["a"]), lambda t, p, b: losses(t, b)[0].mean()
        )
        return BilevelSolver(problem, SGD(0.1), SGD(1.0), OneStep(route))

    batch, ends = wrap(torch.tensor([[0, 1, 1], [1, 1, 1]])), []
    for route in (PerExample(), Jvp()):
        state = solver(route).init(f.params, {"a": torch.zeros(2, dtype=torch.float64)})
        state, info = solver(route).step(state, [batch], batch)
        assert info.notes == ()
        ends.append(state)
    torch.testing.assert_close(ends[0].lower_params, ends[1].lower_params)
    torch.testing.assert_close(ends[0].upper_params, ends[1].upper_params)


LOSSES = lambda t, b: ((b @ t["w"]).squeeze(1), None)  # noqa: E731


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: OneStep(Unrolled()), r"OneStep: route must be Auto\(\).*got Unrolled"),
        (lambda: OneStep("jvp"), r"OneStep: route must be .*got 'jvp'"),
        (lambda: OneStep(Jvp), r"OneStep: route must be .*got <class"),
        (lambda: Implicit("cg"), r"Implicit: solver must be .*got 'cg'"),
        (lambda: Implicit(ConjugateGradient), r"Implicit: solver must be .*got <class"),
        (lambda: Unrolled(product=Jvp), r"Unrolled: product must be .*got <class"),
        (lambda: Implicit(product=Jvp), r"Implicit: product must be .*got <class"),
        (lambda: SGD("0.1"), r"SGD: lr must be a number, got '0.1' \(str\)"),
        (lambda: Adam(None), r"Adam: lr must be a number, got None"),
    ],
)
def test_what_is_no_part_of_a_method_or_an_optimizer(make, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        make()


@pytest.mark.parametrize(
    ("problem", "sentence"),
    [
        (
            BilevelProblem(lambda t, p, b: PROBLEM.lower_loss(t, p, b).cfloat(), None),
            r"lower_loss: expected a scalar tensor, found \(\) of torch.complex64",
        ),
        (
            BilevelProblem(lambda t, p, b: PROBLEM.lower_loss(t, p, b).long(), None),
            r"lower_loss: .* of torch.int64",
        ),
        (
            BilevelProblem(PROBLEM.lower_loss, lambda t, p, b: b.argmax()),
            r"upper_loss: .*found \(\) of torch.int64",
        ),
        (
            ReweightingProblem(lambda t, b: (b.argmax(1), None), None, None),
            r"per_example_loss: .*found losses \(2,\) of torch.int64",
        ),
        (
            ReweightingProblem(LOSSES, lambda p, b, f: torch.ones(2, dtype=torch.long), None),
            r"weights: .*found \(2,\) of torch.int64",
        ),
    ],
)
@pytest.mark.parametrize("method", [OneStep(), OneStep(Jvp()), Unrolled()], ids=str)
def test_losses_and_weights_that_are_no_real_numbers(problem, sentence, method):
    solver = BilevelSolver(problem, SGD(0.1), SGD(1.0), method)
    with pytest.raises(ValueError, match=sentence):
        solver.step(start(solver), [X], X)


def test_what_is_no_state():
    for state in ({"w": X}, (1, 2), [X]):
        for call in (SOLVER.step, SOLVER.window, SOLVER.advance):
            with pytest.raises(TypeError, match=r"state: expected what solver.init\(.*found a "):
                call(state, [[X]] if call != SOLVER.step else [X], X)
    other = BilevelSolver(PROBLEM, Adam(0.1), SGD(1.0))
    with pytest.raises(ValueError, match="Adam: the state is that of another optimizer"):
        other.step(start(), [X], X)


@pytest.mark.parametrize("source", [X, {"x": X}, None, X.numpy(), "text", Pair(X, X)])
def test_what_is_no_source_of_batches(source):
    with pytest.raises(TypeError, match=r"fit: lower_batches: .*if it is one batch, give \["):
        fit(SOLVER, start(), source, [X], steps=2)
    with pytest.raises(TypeError, match=r"fit: upper_batches: expected a DataLoader"):
        fit(SOLVER, start(), [X], source, steps=2)


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda p: p["a"].exp(), "expected hyperparameters by name, such as"),
        (lambda p: {"lr": 0.1}, "scalar tensor as the hyperparameter 'lr'.*found float"),
        (lambda p: {"lr": p["a"].exp() * torch.ones(3)}, r"hyperparameter 'lr'.*found \(3,\)"),
        (lambda p: {"lr": p["a"].exp().detach()}, "hyperparameters: nothing that it returns dep"),
    ],
)
@pytest.mark.parametrize("method", [OneStep(), Unrolled()], ids=str)
def test_hyperparameters_that_are_none(function, sentence, method):
    solver = BilevelSolver(PROBLEM, SGD(0.1), SGD(1.0), method, hyperparameters=function)
    with pytest.raises((TypeError, ValueError), match=sentence):
        solver.step(start(solver), [X], X)


def test_a_start_that_does_not_depend_on_the_upper_parameters():
    fixed = {"w": torch.ones(3, 1)}
    solver = BilevelSolver(PROBLEM, SGD(0.1), SGD(1.0), Unrolled(), initial=lambda p: fixed)
    with pytest.raises(ValueError, match="initial: nothing that it returns depends on φ"):
        solver.step(start(solver), [X], X)
