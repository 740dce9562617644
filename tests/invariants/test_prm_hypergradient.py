"""The hypergradient of the real objective: a model that sees tiles, every route, a plain loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bilevel import AdamW, BilevelSolver, Ghost, Jvp, OneStep, PerExample, tree
from prm.aggregations import AGGREGATIONS
from prm.models.model import load_prm, split_parameters
from recipes.method.objective import Objective
from recipes.models.loading import read_examples
from tests.invariants.setting import Setup, by_loop, by_route, distance, double
from tests.tiny_task import FORWARD_MODE, altered
from weighting import Clip, InstanceNet, InstanceTable, Sigmoid

# The model computes its norms and softmaxes in float32 whatever its parameters are.
LIMIT = 1e-6
FEATURES = ("label", "p_label", "p_plus")
TABLE = InstanceTable(8, bound=Clip(0.0, 2.0), normalise="none")
WEIGHTINGS = {
    "table": TABLE,
    "table, mean one": replace(TABLE, normalise="batch"),
    "net": InstanceNet(2 * len(FEATURES) - 1, bound=Sigmoid(2.0)),
}


@pytest.fixture(scope="module", params=WEIGHTINGS)
def setup(request, task, tmp_path_factory):
    """Eight examples of 0 to 3 tiles each; everything is trained, the vision tower too."""
    directory = tmp_path_factory.mktemp("tiles")

    def picture(place, row):
        return row | {"images": [row["images"], [], row["images"] * 3][place % 3]}

    prm = load_prm(task.model, dtype=torch.float64)
    options = task.train(directory)
    train = altered(task.data / "train.jsonl", directory / "train.jsonl", picture)
    data = read_examples(prm, options, str(train))
    rows = data.with_rows({example.id: row for row, example in enumerate(data.examples)})
    batch = double(rows.batch(range(8)))
    meta = read_examples(prm, options, options.data.meta_file)
    weighting = WEIGHTINGS[request.param]
    generator = torch.Generator().manual_seed(2)
    batch["reference_probs"] = torch.rand(
        batch["labels"].shape, generator=generator, dtype=torch.float64
    )
    objective = Objective(prm, AGGREGATIONS["mean"], "both", weighting, FEATURES, reference=True)
    lower, _ = split_parameters(prm.model, ())
    optimizer = AdamW(1e-3, max_norm=1.0)
    solver = BilevelSolver(objective.problem(), optimizer, AdamW(0.1), OneStep(Jvp()))
    upper = tree.map(Tensor.double, weighting.init())
    upper = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in upper.items()
    }
    state = solver.init(lower, upper)
    for _ in range(2):  # a warm optimizer
        state, _ = solver.step(state, [batch])
    return Setup(
        objective,
        optimizer,
        state.lower_params,
        state.lower_optimizer,
        upper,
        batch,
        double(meta.batch(range(6))),
    )


def test_batch_has_tiles_of_its_own_number(setup):
    assert setup.batch["num_patches"].tolist() == [1, 0, 3, 1, 0, 3, 1, 0]
    assert len(setup.batch["pixel_values"]) == 9


@FORWARD_MODE
@pytest.mark.parametrize(
    ("route", "order"),
    [
        (Ghost(), "upper-first"),
        (PerExample(), "upper-first"),
        (PerExample(), "lower-first"),
        (Jvp(), "upper-first"),
        (Jvp(), "lower-first"),
    ],
)
def test_routes_equal_a_loop_over_examples(setup, route, order):
    expected = by_loop(setup, order)
    assert float(tree.norm(expected)) > 1e-8
    assert distance(by_route(setup, OneStep(route, order)), expected) < LIMIT


@pytest.mark.parametrize("order", ["upper-first", "lower-first"])
def test_order_of_the_rows_does_not_matter(setup, order):
    shuffled = torch.tensor([3, 0, 7, 5, 1, 6, 2, 4])
    starts = setup.batch["num_patches"].cumsum(0) - setup.batch["num_patches"]
    tiles = [
        torch.arange(int(starts[row]), int(starts[row] + setup.batch["num_patches"][row]))
        for row in shuffled
    ]
    moved = {
        name: value[torch.cat(tiles) if name == "pixel_values" else shuffled]
        for name, value in setup.batch.items()
    }
    route = OneStep(Ghost() if order == "upper-first" else PerExample(), order)
    expected = by_route(setup, route)
    assert distance(by_route(replace(setup, batch=moved), route), expected) < LIMIT
