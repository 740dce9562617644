"""The hypergradient of learned labels through the real objective: differences, and by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from bilevel import (
    SGD,
    AdamW,
    Auto,
    BilevelSolver,
    CentralDifference,
    Jvp,
    OneStep,
    ResidentSolver,
    Reverse,
    tree,
)
from prm.aggregations import AGGREGATIONS
from prm.models.model import load_prm, split_parameters, step_logits
from recipes.method.objective import Objective
from recipes.models.loading import read_examples
from tests.invariants.setting import Setup, by_route, distance, double
from tests.tiny_task import FORWARD_MODE, altered
from weighting import StepLabels


def _exact_norm(self: Qwen2RMSNorm, hidden: Tensor) -> Tensor:
    """The norm of transformers, but for its float32, whose rounding would drown differences."""
    scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * (hidden * scale)


@pytest.fixture(scope="module")
def setup(task, tmp_path_factory):
    """Six examples of unequal step counts in float64, of which one label is missing and one soft.

    The labels have moved, and the optimizer is warm.
    """
    directory = tmp_path_factory.mktemp("labels")

    def shortened(place, row):
        return row | {"steps": row["steps"][: len(row["steps"]) - place % 3]}

    prm = load_prm(task.model, dtype=torch.float64)
    options = task.train(directory)
    train = altered(task.data / "train.jsonl", directory / "train.jsonl", shortened)
    data = read_examples(prm, options, str(train))
    data = data.with_rows({example.id: row for row, example in enumerate(data.examples)})
    batch = double(data.batch(range(6)))
    counts = batch["step_mask"].sum(1)
    assert counts.tolist() == [5, 4, 3, 5, 4, 3]
    batch["labels"][0, 0], batch["labels"][1, 1] = float("nan"), 0.3
    meta = read_examples(prm, options, options.data.meta_file)
    weighting = StepLabels(8, int(counts.max()), trust=0.85)
    objective = Objective(prm, AGGREGATIONS["mean"], "both", weighting)
    lower, _ = split_parameters(prm.model, ("vision_tower", "multi_modal_projector"))
    generator = torch.Generator().manual_seed(3)
    shape = weighting.init()["deviation"].shape
    upper = {"deviation": torch.randn(shape, generator=generator, dtype=torch.float64)}
    optimizer = AdamW(1e-2, max_norm=1.0)
    state = optimizer.init(lower)
    for scale in (0.7, 1.0):
        grads = {
            name: scale * torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            for name, leaf in lower.items()
        }
        lower, state = optimizer.update(grads, state, lower)
    return Setup(objective, optimizer, lower, state, upper, batch, double(meta.batch(range(6))))


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(Qwen2RMSNorm, "forward", _exact_norm)


def loss_by_hand(setup, lower, upper):
    """(1/B) Σ_i 1/|T_i| Σ_s −[q log p₊ + (1 − q) log p₋], example by example, step by step."""
    batch = setup.batch
    logits = step_logits(setup.objective.prm, lower, batch)
    z = logits[..., 0] - logits[..., 1]
    total = z.new_zeros(())
    for row, index in enumerate(batch["index"].tolist()):
        terms = []
        for step in range(int(batch["step_mask"][row].sum())):
            y = float(batch["labels"][row, step])
            if y != y:
                continue
            start = 0.15 + 0.7 * y
            odds = start / (1 - start) * torch.exp(upper["deviation"][index, step])
            q = odds / (1 + odds)
            soft = torch.nn.functional.softplus
            terms.append(q * soft(-z[row, step]) + (1 - q) * soft(z[row, step]))
        total = total + sum(terms) / len(terms)
    return total / len(batch["labels"])


def stepped(setup, upper):
    """The parameters after one step on the loss by hand."""
    leaves = tree.map(lambda leaf: leaf.detach().requires_grad_(), setup.lower)
    loss = loss_by_hand(setup, leaves, upper)
    grads = torch.autograd.grad(loss, leaves.values(), materialize_grads=True)
    with torch.no_grad():
        named = dict(zip(leaves, grads, strict=True))
        return setup.optimizer.update(named, setup.state, setup.lower)[0]


def test_loss_is_the_cross_entropy_against_learned_labels(setup):
    found = setup.objective.problem().lower_loss(setup.lower, setup.upper, setup.batch)
    torch.testing.assert_close(found, loss_by_hand(setup, setup.lower, setup.upper))


@pytest.mark.parametrize("optimizer", [SGD(0.5), AdamW(1e-2)], ids=["sgd", "adamw"])
def test_hypergradient_is_the_difference_of_whole_steps(setup, optimizer):
    """A label logit is moved by ± h, the lower step is taken, the meta loss of its end compared."""
    state = optimizer.init(setup.lower) if isinstance(optimizer, SGD) else setup.state
    here = replace(setup, optimizer=optimizer, state=state)
    found = by_route(here, OneStep(Auto(), "lower-first"))["deviation"]
    h, expected = 1e-3, torch.zeros_like(found)
    places = [(0, 1), (1, 0), (1, 1), (4, 0)]
    for place in places:
        sides = []
        for sign in (1, -1):
            upper = {"deviation": setup.upper["deviation"].clone()}
            upper["deviation"][place] += sign * h
            sides.append(float(here.objective.upper_loss(stepped(here, upper), upper, here.meta)))
        expected[place] = (sides[0] - sides[1]) / (2 * h)
    looked = torch.stack([found[place] for place in places])
    wanted = torch.stack([expected[place] for place in places])
    assert float(wanted.abs().min()) > 0
    assert float((looked - wanted).norm() / wanted.norm()) < 1e-5


def test_steps_without_a_label_have_no_part_in_it(setup):
    found = by_route(setup, OneStep(Auto(), "lower-first"))["deviation"]
    used = torch.zeros_like(found, dtype=torch.bool)
    known = setup.batch["step_mask"] & ~setup.batch["labels"].isnan()
    used[setup.batch["index"], : known.shape[1]] = known
    assert torch.equal(found != 0, used)


@FORWARD_MODE
@pytest.mark.parametrize("order", ["lower-first", "upper-first"])
def test_routes_agree(setup, order):
    first, double_backward, difference = (
        by_route(setup, OneStep(route, order)) for route in (Jvp(), Reverse(), CentralDifference())
    )
    assert float(tree.norm(first)) > 0
    assert distance(double_backward, first) < 1e-10
    assert distance(difference, first) < 1e-6


@FORWARD_MODE
def test_in_place_gives_the_same(setup):
    """Order upper-first is done in place; the state is consumed, so of copies."""
    arguments = (
        setup.objective.problem(),
        AdamW(1e-2),
        SGD(1.0),
        OneStep(Auto(), "upper-first"),
    )
    ends = []
    for kind in (BilevelSolver, ResidentSolver):
        solver = kind(*arguments)
        state = solver.init(tree.map(torch.clone, setup.lower), tree.map(torch.clone, setup.upper))
        for _ in range(2):
            state, _ = solver.step(state, [setup.batch], setup.meta)
        ends.append(state)
    plain, resident = ends
    assert distance(resident.upper_params, plain.upper_params) < 1e-10
    assert float(tree.norm(tree.axpy(-1.0, setup.upper, plain.upper_params))) > 0
