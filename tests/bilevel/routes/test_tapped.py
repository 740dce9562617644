"""Whose rows the rows are: constants as long as the batch, other orders, examples that interact."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from bilevel import (
    Auto,
    Dot,
    Ghost,
    Jvp,
    OneStep,
    PerExample,
    Refusal,
    ReweightingProblem,
    tree,
)
from tests.bilevel.by_hand import cubes, step_by_hand, step_of_solver
from tests.bilevel.comparing import relative, same_bits
from tests.bilevel.zoo import build

BATCH, SIZE = 4, 3
UPPER = {"raw": torch.tensor([-1.0, 0.2, 0.9, 2.0], dtype=torch.float64)}


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem_of(losses) -> ReweightingProblem:
    return ReweightingProblem(
        lambda lower, batch: (losses(lower, batch), None),
        lambda upper, batch, features: torch.sigmoid(upper["raw"][: len(batch["index"])]),
        cubes,
    )


def batch_of(size=BATCH, **tensors):
    return {"x": draw(size, SIZE, seed=1), "index": torch.arange(size), **tensors}


def energy(hidden):
    """A loss per row that mixes its entries."""
    flat = torch.tanh(hidden).flatten(1)
    return (flat @ torch.arange(1.0, 1.0 + flat.shape[1], dtype=hidden.dtype)) ** 2


FROZEN, MASK = draw(BATCH, SIZE, seed=2), (draw(BATCH, SIZE, seed=3) > 0).double()
SAME_WEIGHT = {"w": draw(BATCH, SIZE, seed=4)}
TABLE = torch.tensor([[1, 2, 0, 3], [3, 3, 1, 0], [0, 4, 4, 2], [2, 1, 0, 4]])

# Constants with as many rows as there are examples: each has a rule.
CONSTANTS = {
    "delta on a frozen weight": lambda p, b: energy(functional.linear(b["x"], FROZEN + p["w"])),
    "frozen weight minus a delta": lambda p, b: energy(b["x"] @ (FROZEN - p["w"]).T),
    "mask on a weight": lambda p, b: energy(functional.linear(b["x"], p["w"] * MASK)),
    "two masks": lambda p, b: energy(b["x"] @ (MASK * p["w"] + (1 - MASK) * FROZEN).T),
    "chosen entries": lambda p, b: energy(b["x"] @ torch.where(MASK > 0, p["w"], FROZEN).T),
    "concatenated columns": lambda p, b: energy(
        b["x"] @ torch.cat([FROZEN[:, 1:], p["w"][:, :1]], dim=1).T
    ),
    "concatenated rows": lambda p, b: energy(b["x"] @ torch.cat([FROZEN[:2], p["w"]]).T),
    "anchors": lambda p, b: energy(b["x"] @ functional.linear(FROZEN, p["w"][:SIZE]).T),
    "anchors made like the batch": lambda p, b: energy(
        b["x"] @ (b["x"].new_tensor(FROZEN.tolist()) @ p["w"][:SIZE]).T
    ),
    "frozen weight in the precision of the batch": lambda p, b: energy(
        functional.linear(b["x"], FROZEN.type_as(b["x"]) + p["w"].to(b["x"]))
    ),
    "a number for each example": lambda p, b: energy(b["x"]) * p["w"][:, 0],
    "a number for each example, from a table": lambda p, b: (
        energy(b["x"]) * p["w"][:, 0][b["index"]]
    ),
    "a shift for each example": lambda p, b: (energy(b["x"]) - p["w"][:, 0]) ** 2,
}


@pytest.mark.parametrize("method", [OneStep(), OneStep(PerExample())], ids=["auto", "rules"])
@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_as_long_as_the_batch_is_a_constant(name, method):
    problem, batch = problem_of(CONSTANTS[name]), batch_of()
    lower, derivative = step_by_hand(problem.lower_loss, SAME_WEIGHT, UPPER, batch)
    found = step_of_solver(problem, method, SAME_WEIGHT, UPPER, [batch], batch)
    assert relative(found[0], lower) <= 1e-14
    assert relative(found[1], derivative) <= 1e-12
    assert found[2] == ()


def sorted_by_size(p, b):
    order = b["x"].norm(dim=1).argsort()
    return energy(b["x"][order] @ p["w"][:SIZE])[order.argsort()]


def contrastive(p, b):
    z = functional.normalize(b["x"] @ p["w"][:SIZE], dim=1)
    return functional.cross_entropy(3 * z @ z.T, b["index"], reduction="none")


def shuffled(p, b):
    order = torch.randperm(len(b["x"]))
    return energy((0.7 * b["x"] + 0.3 * b["x"][order]) @ p["w"][:SIZE])


def behind_a_closed_gate(p, b):
    """Each example has features of all others, through a gate that is 0 at first."""
    hidden = torch.tanh(b["x"] @ p["v"])
    return energy(b["x"] @ p["w"][:SIZE] + p["gate"] * (hidden - hidden.mean(0)))


# Not example by example, although every leading dimension has the size of the batch.
OTHERS = {
    "rows in another order": lambda p, b: energy(b["x"][[2, 0, 3, 1]] @ p["w"][:SIZE])[
        [1, 3, 0, 2]
    ],
    "rows back to front": lambda p, b: energy(b["x"].flip(0) @ p["w"][:SIZE]).flip(0),
    "rows sorted": sorted_by_size,
    "rows mixed": shuffled,
    "as many positions as examples": lambda p, b: (
        torch.tanh(functional.embedding(b["tokens"].T, p["table"])).sum(2).pow(2).sum(0)
    ),
    "time first in the batch itself": lambda p, b: (
        torch.tanh(b["sequence"] @ p["w"][:SIZE]).sum(2).pow(2).sum(0)
    ),
    "time first and back": lambda p, b: energy(
        torch.tanh(b["sequence"].transpose(0, 1) @ p["w"][:SIZE]).transpose(0, 1)
    ),
    "losses sorted": lambda p, b: energy(b["x"] @ p["w"][:SIZE]).sort().values,
    "batch statistics": lambda p, b: energy(
        functional.batch_norm(b["x"] @ p["w"][:SIZE], None, None, training=True)
    ),
    "contrastive": contrastive,
    "mean of the others": lambda p, b: energy(
        (hidden := torch.tanh(b["x"] @ p["w"][:SIZE])) + hidden.mean(0) / 2
    ),
    "softmax over the examples": lambda p, b: torch.softmax(energy(b["x"] @ p["w"][:SIZE]), 0),
    "behind a gate that is closed at first": behind_a_closed_gate,
}
PARAMS = {
    **SAME_WEIGHT,
    "table": draw(5, SIZE, seed=5),
    "v": draw(SIZE, SIZE, seed=6),
    "gate": torch.zeros(SIZE, dtype=torch.float64),
}


def other_batch():
    return batch_of(tokens=TABLE, sequence=draw(BATCH, BATCH, SIZE, seed=7))


def used(losses):
    """The parameters that the losses depend on; the plainest autograd asks for all of them."""
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in PARAMS.items()}
    total = losses(leaves, other_batch()).sum()
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    pairs = zip(PARAMS.items(), grads, strict=True)
    return {name: leaf for (name, leaf), gradient in pairs if gradient is not None}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_example_by_example_falls_back_and_is_exact(name):
    problem, batch, params = problem_of(OTHERS[name]), other_batch(), used(OTHERS[name])
    torch.manual_seed(1)
    lower, derivative = step_by_hand(problem.lower_loss, params, UPPER, batch)
    torch.manual_seed(1)
    found = step_of_solver(problem, OneStep(), params, UPPER, [batch], batch)
    assert relative(found[0], lower) <= 1e-14
    assert relative(found[1], derivative) <= 1e-12
    (note,) = found[2]
    assert note.startswith("Auto() took Jvp(): ")


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_example_by_example_is_refused_by_the_rules(name):
    problem, batch, params = problem_of(OTHERS[name]), other_batch(), used(OTHERS[name])
    for method in (OneStep(PerExample()), OneStep(Ghost(), "upper-first")):
        with pytest.raises(Refusal, match=r"route (PerExample|Ghost)\(\): .*or choose Auto\(\)"):
            step_of_solver(problem, method, params, UPPER, [batch], batch)


def test_a_dimension_that_comes_to_have_the_size_of_the_batch_is_found():
    """Time first is noticed by its size at first, and measured when it is as long as the batch."""

    def losses(p, b):
        hidden = torch.tanh(b["sequence"].transpose(0, 1) @ p["w"][:SIZE])
        return hidden.sum(2).pow(2).sum(0)

    problem = problem_of(losses)
    for steps in (5, 3, BATCH):
        batch = batch_of(sequence=draw(BATCH, steps, SIZE, seed=7))
        lower, _ = step_by_hand(problem.lower_loss, SAME_WEIGHT, UPPER, batch)
        found = step_of_solver(problem, OneStep(), SAME_WEIGHT, UPPER, [batch], batch)
        assert relative(found[0], lower) <= 1e-14
        assert ("found" if steps != BATCH else "joins the rows") in found[2][0]


def test_interaction_that_begins_with_a_longer_batch_is_found():
    def losses(p, b):
        hidden = b["x"] @ p["w"][:SIZE]
        return energy(hidden - hidden.mean(0) if len(hidden) > 3 else hidden)

    problem = problem_of(losses)
    for size, notes in ((3, 0), (4, 1)):
        batch = batch_of(size)
        lower, _ = step_by_hand(problem.lower_loss, SAME_WEIGHT, UPPER, batch)
        found = step_of_solver(problem, OneStep(), SAME_WEIGHT, UPPER, [batch], batch)
        assert relative(found[0], lower) <= 1e-14
        assert len(found[2]) == notes


def test_single_examples_that_would_interact_in_a_batch_are_exact_by_dot():
    problem = problem_of(OTHERS["mean of the others"])
    singles = [{name: leaf[[row]] for name, leaf in batch_of().items()} for row in range(BATCH)]
    by_example = ReweightingProblem(
        problem.per_example_loss,
        lambda upper, batch, features: torch.sigmoid(upper["raw"][batch["index"]]),
        cubes,
    )

    def total(lower, upper, batches):
        return sum(by_example.lower_loss(lower, upper, batch) for batch in batches) / BATCH

    params = {"w": PARAMS["w"]}
    lower, derivative = step_by_hand(total, params, UPPER, singles)
    for method in (OneStep(), OneStep(Dot())):
        found = step_of_solver(by_example, method, params, UPPER, singles, 0)
        assert tree.norm(tree.axpy(-1.0, lower, found[0])) <= 1e-14
        assert tree.norm(tree.axpy(-1.0, derivative, found[1])) <= 1e-14


@pytest.mark.parametrize("name", ["dropout", "encoder", "tiles"])
def test_numbers_do_not_depend_on_whether_the_rules_were_measured(name):
    """The random numbers neither: a run that is resumed measures again."""
    case = build(name)
    torch.manual_seed(1)
    first = step_of_solver(
        case.problem, OneStep(), case.params, case.upper_params, [case.batch], case.upper_batch
    )
    drawn = torch.get_rng_state()
    assert list(case.problem.verdicts.values()) == [None]
    torch.manual_seed(1)
    second = step_of_solver(
        case.problem, OneStep(), case.params, case.upper_params, [case.batch], case.upper_batch
    )
    assert same_bits(first[:2], second[:2])
    assert torch.equal(torch.get_rng_state(), drawn)


def test_losses_that_are_not_finite_are_measured_when_they_are():
    problem = problem_of(lambda p, b: energy(b["x"] @ p["w"][:SIZE]) / b["divisor"])
    for divisor, verdicts in ((0.0, []), (2.0, [None])):
        batch = batch_of(divisor=torch.full((BATCH,), divisor, dtype=torch.float64))
        step_of_solver(problem, OneStep(PerExample()), SAME_WEIGHT, UPPER, [batch], batch)
        assert list(problem.verdicts.values()) == verdicts


def test_a_derivative_within_the_loss_is_not_taken_through_taps():
    """A gradient penalty: its graph to the parameters would end at the taps."""

    def losses(p, b):
        x = b["x"].clone().requires_grad_()
        values = energy(x @ p["w"][:SIZE])
        (slopes,) = torch.autograd.grad(values.sum(), x, create_graph=True)
        return values + (slopes.norm(dim=1) - 1.0) ** 2

    problem, batch = problem_of(losses), batch_of()
    lower, derivative = step_by_hand(problem.lower_loss, SAME_WEIGHT, UPPER, batch)
    found = step_of_solver(problem, OneStep(), SAME_WEIGHT, UPPER, [batch], batch)
    assert relative(found[0], lower) <= 1e-14
    assert relative(found[1], derivative) <= 1e-12
    assert "create_graph=True" in found[2][0]


@pytest.mark.parametrize("batch", [torch.arange(4), slice(0, 4), [0, 1, 2, 3]], ids=repr)
def test_data_that_the_loss_holds_itself_keep_the_rules(batch):
    """The batch says which rows: as a tensor, or as what is no tensor at all."""
    data = draw(6, SIZE, seed=1)
    problem = ReweightingProblem(
        lambda lower, rows: (energy(data[rows] @ lower["w"][:SIZE]), None),
        lambda upper, rows, features: torch.sigmoid(upper["raw"]),
        cubes,
    )
    lower, derivative = step_by_hand(problem.lower_loss, SAME_WEIGHT, UPPER, batch)
    found = step_of_solver(problem, OneStep(PerExample()), SAME_WEIGHT, UPPER, [batch], batch)
    assert relative(found[0], lower) <= 1e-14
    assert relative(found[1], derivative) <= 1e-12


@pytest.mark.parametrize("method", [OneStep(), OneStep(PerExample()), OneStep(Jvp())], ids=str)
def test_sparse_gradients_of_an_embedding_are_made_dense(method):
    net = nn.Embedding(5, SIZE, sparse=True).double()
    params = {name: leaf.detach() for name, leaf in net.named_parameters()}
    batch = batch_of(tokens=TABLE)

    def problem(sparse):
        net.sparse = sparse
        return problem_of(lambda p, b: energy(functional_call(net, p, (b["tokens"],))))

    dense = problem(False)
    lower, derivative = step_by_hand(dense.lower_loss, params, UPPER, batch)
    sparse = problem(True)
    found = step_of_solver(sparse, method, params, UPPER, [batch], batch)
    assert relative(found[0], lower) <= 1e-14
    assert relative(found[1], derivative) <= 1e-12


@pytest.mark.parametrize("route", [Auto(), PerExample(), Jvp()], ids=["auto", "rules", "jvp"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_micro_batch_without_examples_contributes_nothing(route, place):
    problem = problem_of(lambda p, b: energy(b["x"] @ p["w"][:SIZE]))
    micro_batches = [batch_of(3), batch_of(2)]
    without = step_of_solver(problem, OneStep(route), SAME_WEIGHT, UPPER, micro_batches, 0)
    micro_batches.insert(place, batch_of(0))
    found = step_of_solver(problem, OneStep(route), SAME_WEIGHT, UPPER, micro_batches, 0)
    assert same_bits(found[:2], without[:2])
    with pytest.raises(ValueError, match="at least 1 example in the 2 micro-batches of a step"):
        step_of_solver(problem, OneStep(route), SAME_WEIGHT, UPPER, [batch_of(0)] * 2, 0)
