"""A weighting that the project does not have: its class, its options, and two entries."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor

from recipes import commands
from recipes.embedded.vocabulary import SYSTEM_PROMPT
from recipes.method.bounded_weights import WEIGHTINGS, Registration
from recipes.options.choices import DomainOptions
from recipes.options.train import TrainOptions
from recipes.options.use import WeighOptions
from recipes.train.training import run_training
from tests.tiny_task import read_lines
from weighting import Bound, Sigmoid, load_weighting


@dataclass(frozen=True)
class LabelTable:
    """``weight = bound(raw[domain] · share of "+" labels)``, one row per domain."""

    reads: ClassVar[tuple[str, ...]] = ("domain", "labels")
    row_key: ClassVar[Literal["index", "domain"] | None] = "domain"
    start: ClassVar[float] = 1.0

    size: int
    bound: Bound = Sigmoid(2.0)

    def init(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"raw": torch.zeros(self.size)}

    def _raw(self, params, batch):
        return params["raw"][batch["domain"]] * batch["labels"].nanmean(-1)

    def batch_weights(self, params, batch):
        return self.bound(self._raw(params, batch))

    def file_weights(self, params, batches: Iterable):
        raw = torch.cat([self._raw(params, batch) for batch in batches])
        return self.bound(raw), raw

    def project(self, params):
        return params

    def share_at_bound(self, params, weights, tolerance: float = 0.01) -> float:
        return 0.0


@dataclass(frozen=True)
class LengthSlope:
    """``weight = bound(slope · log₁₀(tokens / 100))``: reads tokens, has no row, asks no model."""

    reads: ClassVar[tuple[str, ...]] = ("attention_mask",)
    row_key: ClassVar[Literal["index", "domain"] | None] = None
    size: ClassVar[int] = 0
    start: ClassVar[float] = 1.0

    offset: int
    bound: Bound = Sigmoid(2.0)

    def init(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"slope": torch.zeros(())}

    def _raw(self, params, batch):
        return params["slope"] * torch.log10(batch["attention_mask"].sum(-1) / self.offset)

    def batch_weights(self, params, batch):
        return self.bound(self._raw(params, batch))

    def file_weights(self, params, batches: Iterable):
        raw = torch.cat([self._raw(params, batch) for batch in batches])
        return self.bound(raw), raw

    def project(self, params):
        return {"slope": params["slope"].clamp(-0.1, 0.1)}

    def share_at_bound(self, params, weights, tolerance: float = 0.01) -> float:
        return 0.0


@dataclass(frozen=True, kw_only=True)
class LabelTableOptions(DomainOptions):
    kind: ClassVar[str] = "label-table"


@dataclass(frozen=True, kw_only=True)
class LengthOptions(DomainOptions):
    kind: ClassVar[str] = "length"


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    entries = {
        "label-table": Registration(
            LabelTable,
            "label_table",
            lambda options, instances, domains, steps: LabelTable(domains),
        ),
        "length": Registration(
            LengthSlope, "length_slope", lambda options, instances, domains, steps: LengthSlope(100)
        ),
    }
    for name, entry in entries.items():
        monkeypatch.setitem(WEIGHTINGS, name, entry)
    (weighting,) = (f for f in fields(TrainOptions) if f.name == "weighting")
    for kind in (LabelTableOptions, LengthOptions):
        monkeypatch.setitem(weighting.metadata["variants"], kind.kind, kind)


@pytest.mark.parametrize("name", ["label-table", "length"])
def test_a_fourth_weighting_trains_is_saved_and_weighs(task, tmp_path, name):
    run = run_training(task.train(tmp_path / "run", weighting=name, steps=2, upper_start=0))
    weighting, params, names, extra = load_weighting(
        run / "weighting", [entry.kind for entry in WEIGHTINGS.values()]
    )
    examples = read_lines(task.data / "train.jsonl")
    rows = read_lines(run / "weights.jsonl")
    assert [row["id"] for row in rows] == [example["id"] for example in examples]
    assert extra == {}
    if name == "label-table":
        assert weighting == LabelTable(3)
        assert names == tuple(dict.fromkeys(example["domain"] for example in examples))
        assert params["raw"].abs().min() > 0  # two upper steps have moved every domain
        raw = dict(zip(names, params["raw"].tolist(), strict=True))
        for row, example in zip(rows, examples, strict=True):
            labels = [step["label"] == "+" for step in example["steps"]]
            expected = raw[example["domain"]] * sum(labels) / len(labels)
            assert row["raw_weight"] == pytest.approx(expected, rel=1e-5)
    else:
        assert (weighting, names) == (LengthSlope(100), ())
        # Projected: a step at the learning rate of auto goes further.
        assert abs(float(params["slope"])) == pytest.approx(0.1)
    for row in rows:
        expected = 2 * torch.sigmoid(torch.tensor(row["raw_weight"]))
        assert row["weight"] == pytest.approx(float(expected), rel=1e-6)
    assert len({row["weight"] for row in rows}) > 2
    logged = read_lines(run / "log.jsonl")[-1]
    assert logged["phase"] == WEIGHTINGS[name].row
    assert WEIGHTINGS[name].row in json.loads((run / "results.json").read_text())["rows"]

    options = {"weighting": str(run / "weighting"), "file": str(task.data / "train.jsonl")}
    if name == "length":  # tokens depend on the prompt, which is given as in the run
        options |= {"model": str(run / "model"), "system_prompt": SYSTEM_PROMPT}
    output = tmp_path / "weights.jsonl"
    assert commands.run("weigh", WeighOptions(output=str(output), **options)) == 0
    kept = [{key: row[key] for key in ("id", "weight", "raw_weight")} for row in rows]
    assert read_lines(output) == kept


def test_a_kind_that_is_not_registered_is_not_loaded(task, tmp_path):
    run = run_training(task.train(tmp_path / "run", weighting="length", steps=1, test_file=None))
    with pytest.raises(ValueError, match="unknown kind 'LengthSlope'"):
        load_weighting(run / "weighting")
