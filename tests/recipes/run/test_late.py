"""Steps that are read late end where steps that are looked at one by one do, to the last bit.

On a CPU, where both can be compared: there is nothing to wait for, so that commands look there.
"""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
from safetensors.torch import load_file

from bilevel import Dot, Ghost, Implicit, OneStep, ResidentSolver, Unrolled
from recipes.method.objective import Objective
from recipes.run.errors import NonFiniteError
from recipes.run.late import all_one, are_possible
from recipes.run.trouble import largest_norm
from recipes.train import loop
from recipes.train.cold_start import run_cold_start
from recipes.train.training import run_training
from tests.tiny_task import model_bits, read_lines
from weighting import InstanceTable

TABLE = {"weighting": "table", "bound": "clip", "normalise": "none"}
RUNS = {
    "table": {**TABLE, "direction_decay": 0.5},
    "net": {"weighting": "net"},
    "accumulation": {**TABLE, "route": "dot", "batch_size": 1, "accumulation": 2},
    "lower-first": {"weighting": "net", "route": "per-example", "order": "lower-first"},
    "rollback of steps": {**TABLE, "rollback": True},
    "resident": {**TABLE, "execution": "resident", "direction_decay": 0.0},
    "none": {"weighting": "none"},
    "resident none": {"weighting": "none", "execution": "resident"},
}
COMMON = {"steps": 10, "log_every": 3, "save_every": 4, "keep_checkpoints": 0}


@pytest.fixture
def late(monkeypatch):
    """Ask for steps to be read late, and return how many were at each reading."""
    counts: list[int] = []
    original = loop.LateSteps.settled

    def settled(self, *arguments):
        counts.append(len(self.unread))
        return original(self, *arguments)

    def begin():
        monkeypatch.setattr(loop, "are_possible", lambda *_: True)
        monkeypatch.setattr(loop.LateSteps, "settled", settled)
        return counts

    return begin


def spoil(monkeypatch, rows):
    """Let the losses of some examples of the table be NaN."""
    original = Objective.per_example_loss

    def per_example_loss(self, lower, batch):
        losses, features = original(self, lower, batch)
        bad = torch.isin(batch["index"], torch.tensor(rows))
        return losses * torch.where(bad, math.nan, 1.0), features

    monkeypatch.setattr(Objective, "per_example_loss", per_example_loss)


def left_behind(run):
    """All that a run leaves behind, but for times."""
    states = sorted((run / "checkpoints").glob("step-*/state.safetensors"))
    results = json.loads((run / "results.json").read_text())
    return {
        "log": read_lines(run / "log.jsonl"),
        "model": model_bits(run),
        "states": {path.parent.name: path.read_bytes() for path in states},
        "troubles": results["troubles"],
    }


@pytest.mark.parametrize("name", RUNS)
def test_healthy_runs(task, tmp_path, late, name):
    kind = {**COMMON, **RUNS[name]}
    expected = left_behind(run_training(task.train(tmp_path / "looked", **kind)))
    counts = late()
    found = left_behind(run_training(task.train(tmp_path / "late", **kind)))
    assert found == expected
    assert max(counts) >= 2
    assert sum(counts) >= 7


@pytest.mark.parametrize("name", ["table", "resident", "rollback of steps"])
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_runs_with_troubles(task, tmp_path, late, monkeypatch, name, policy):
    spoil(monkeypatch, [3, 11])
    kind = {**COMMON, **RUNS[name], "on_trouble": policy, "batch_size": 3}
    expected = left_behind(run_training(task.train(tmp_path / "looked", **kind)))
    assert expected["troubles"]
    late()
    found = left_behind(run_training(task.train(tmp_path / "late", **kind)))
    assert found == expected


def test_a_cold_start(task, tmp_path, late):
    kind = {"steps": 5, "log_every": 4, "execution": "resident"}
    runs = [run_cold_start(task.cold_start(tmp_path / "looked", **kind))]
    late()
    runs.append(run_cold_start(task.cold_start(tmp_path / "late", **kind)))
    assert model_bits(runs[0]) == model_bits(runs[1])
    logs = [read_lines(run / "log.jsonl") for run in runs]
    assert logs[0] == logs[1]


def test_where_steps_are_read_late(task):
    class Solver:
        def __init__(self, method):
            self.hypergradient = method

    class State:
        def __init__(self, device):
            self.lower_params = {"w": torch.zeros(1, device=device)}

    def possible(method, device="meta", ranks=1):
        return are_possible(Solver(method), State(device), ranks)

    assert possible(OneStep())
    assert not possible(OneStep(), "cpu")
    assert not possible(OneStep(), ranks=2)
    assert not possible(Unrolled())
    assert not possible(Implicit())
    in_place = object.__new__(ResidentSolver)
    for method, expected in (
        (OneStep(Ghost(), order="upper-first"), True),
        (OneStep(Ghost(), order="upper-first", direction_decay=0.9), False),
        (OneStep(Dot()), False),
    ):
        object.__setattr__(in_place, "hypergradient", method)
        assert are_possible(in_place, State("meta"), 1) is expected


@pytest.mark.parametrize("count", [9, 10, 11, 20])
def test_the_largest_usual_norm_is_that_of_the_host(count):
    norms = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    largest = largest_norm(norms)
    if count < 10:
        assert largest is None
    else:
        assert float(largest) == 1e4 * statistics.median(norms.tolist())
    assert float(largest_norm(torch.zeros(12, dtype=torch.float64))) == math.inf


def test_weights_of_one():
    class Info:
        def __init__(self, weights):
            self.weights = None if weights is None else torch.tensor(weights)

    assert all_one([Info([1.0, 1.0]), Info(None)])
    assert not all_one([Info([1.0, 1.0]), Info([1.0, 0.9])])
    assert not all_one([Info(None)])


def test_an_upper_step_in_place_that_is_not_finite_ends_the_run(task, tmp_path, late, monkeypatch):
    """The lower level has moved by then, and there is nothing to go back to."""
    calls = []
    original = InstanceTable.project

    def project(self, params):
        calls.append(None)
        bad = math.nan if len(calls) == 10 else 1.0  # after steps that were looked at again
        return {name: leaf * bad for name, leaf in original(self, params).items()}

    monkeypatch.setattr(InstanceTable, "project", project)
    late()
    kind = {**RUNS["resident"], "on_trouble": "skip", "steps": 10, "log_every": 3}
    with pytest.raises(NonFiniteError, match="an upper parameter is not finite, and the lower"):
        run_training(task.train(tmp_path / "run", **kind))
    (kept,) = (tmp_path / "run" / "checkpoints").iterdir()
    state = load_file(kept / "state.safetensors")
    assert all(bool(leaf.isfinite().all()) for leaf in state.values())
    assert int(state["state/lower_steps"]) == int(state["state/upper_steps"]) + 2


def test_a_step_in_place_that_fails_halfway_is_not_saved(task, tmp_path, late, monkeypatch):
    """θ has moved, φ has not: the run goes on from its last checkpoint."""
    calls = []
    original = ResidentSolver._upper_step

    def upper_step(self, *arguments):
        calls.append(None)
        if len(calls) == 7:
            raise OSError("gone")
        return original(self, *arguments)

    monkeypatch.setattr(ResidentSolver, "_upper_step", upper_step)
    late()
    kind = {**COMMON, **RUNS["resident"], "log_every": 8}
    with pytest.raises(Exception, match="After a step that was not completed: the state is in"):
        run_training(task.train(tmp_path / "run", **kind))
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert saved.name == "step-4"
