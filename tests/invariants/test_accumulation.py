"""Two micro-batches of four are one batch of eight, up to rounding."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from recipes.train.training import run_training
from tests.tiny_task import read_lines

CASES = {
    "no selection": {"weighting": "none"},
    "table": {"weighting": "table", "bound": "clip", "normalise": "none", "upper_lr": "0.05"},
    "table, lower-first": {
        "weighting": "table",
        "bound": "clip",
        "normalise": "none",
        "upper_lr": "0.05",
        "order": "lower-first",
    },
    "domain": {"weighting": "domain", "bound": "softplus", "upper_lr": "0.05"},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_micro_batches_make_up_the_batch(task, tmp_path, case):
    def run(name, **more):
        return run_training(task.train(tmp_path / name, lower_lr=5e-4, **case, **more))

    whole = run("whole", batch_size=8)
    parts = run("parts", batch_size=4, accumulation=2)
    for one, other in zip(
        read_lines(whole / "log.jsonl"), read_lines(parts / "log.jsonl"), strict=True
    ):
        assert list(one) == list(other)
        for name in {"lower_loss", "lower_grad_norm", "weights/mean", "upper_loss"} & set(one):
            assert one[name] == pytest.approx(other[name], rel=2e-6)
    ends = [load_file(at / "model" / "model.safetensors") for at in (whole, parts)]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)
    if case["weighting"] != "none":
        rows = [read_lines(at / "weights.jsonl") for at in (whole, parts)]
        assert [row["visits"] for row in rows[0]] == [row["visits"] for row in rows[1]]
        weights = [[row["weight"] for row in each] for each in rows]
        assert weights[0] == pytest.approx(weights[1], abs=1e-5)
        assert max(weights[0]) - min(weights[0]) > 0.01
