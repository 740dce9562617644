"""Every kind of model that is supported, warmed up in float64."""

from __future__ import annotations

import pytest
import torch

from bilevel import (
    AdamW,
    BilevelSolver,
    Jvp,
    OneStep,
    tree,
)
from prm.aggregations import AGGREGATIONS
from prm.models.model import split_parameters
from recipes.method.objective import Objective
from tests.invariants.setting import (
    Setup,
    double,
)
from tests.prm.tiny import (
    SYSTEM,
    example,
    in_float64,
    internvl,
    llama,
    qwen,
    qwen2_5_vl,
    qwen2_vl,
    save_image,
)
from weighting import InstanceTable

FAMILIES = {
    "internvl": internvl,
    "qwen2-vl": qwen2_vl,
    "qwen2.5-vl": qwen2_5_vl,
    "qwen2": qwen,
    "llama": llama,
}


TABLE = InstanceTable(4, normalise="none")


@pytest.fixture(scope="module", params=FAMILIES)
def setup(request, tmp_path_factory):
    """One image, none, two, one again; both levels; everything is trained; a warm optimizer."""
    folder = tmp_path_factory.mktemp("images")
    wide = save_image(folder / "wide.png", 100, 60, seed=1)
    tall = save_image(folder / "tall.png", 50, 200, seed=2)
    with pytest.MonkeyPatch.context() as patch:
        prm = in_float64(FAMILIES[request.param](), patch)
        yield warm(prm, wide, tall)


def warm(prm, wide, tall, lower=None) -> Setup:
    index = {name: row for row, name in enumerate("abcd")}
    collator = prm.collator(system_prompt=SYSTEM, index=index)
    images = [(), (), (), ()] if prm.image_tokens is None else [(wide,), (), (wide, tall), (wide,)]
    steps = (3, 2, 4, 1)
    rows = [
        example(name, steps[row], images[row], correct=row % 2 == 0) for name, row in index.items()
    ]
    batch, meta = (double(collator(some)) for some in (rows, rows[::-1]))
    objective = Objective(prm, AGGREGATIONS["mean"], "both", TABLE)
    if lower is None:
        lower, _ = split_parameters(prm.model)
    optimizer = AdamW(1e-3)
    generator = torch.Generator().manual_seed(2)
    upper = {
        name: value + 0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in tree.map(torch.Tensor.double, TABLE.init()).items()
    }
    solver = BilevelSolver(objective.problem(), optimizer, AdamW(0.1), OneStep(Jvp()))
    state = solver.init(lower, upper)
    for _ in range(2):
        state, _ = solver.step(state, [batch])
    at = state.lower_params, state.lower_optimizer
    return Setup(objective, optimizer, *at, upper, batch, meta)
