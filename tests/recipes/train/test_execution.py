"""Steps in place by the commands: the same results, resumable, and what they do about trouble."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from bilevel import BilevelSolver, Dot, OneStep, ResidentSolver, StepInfo
from prm.aggregations import AGGREGATIONS
from recipes.method.bounded_weights import make_weighting
from recipes.method.make_solver import RESIDENT_FROM, make_plain_solver, make_solver
from recipes.method.objective import Objective
from recipes.options.parse import train_options
from recipes.options.values import OptionError
from recipes.run.errors import NonFiniteError
from recipes.train import loop
from recipes.train.cold_start import run_cold_start
from recipes.train.training import run_training
from tests.tiny_task import model_bits, read_lines

TABLE = {"weighting": "table", "bound": "clip", "normalise": "none"}
NET = {"weighting": "net", "reference_features": True}
SINGLE = {
    **TABLE,
    "batch_size": 1,
    "order": "lower-first",
    "direction_decay": 0.0,
    "steps": 6,
    "upper_start": 2,
}


def model(directory):
    return load_file(directory / "model" / "model.safetensors")


def largest_difference(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("kind", [TABLE, {"weighting": "net"}, SINGLE], ids=["table", "net", "dot"])
def test_both_executions_train_the_same_model(task, tmp_path, kind):
    runs = {
        name: run_training(task.train(tmp_path / name, execution=name, **kind))
        for name in ("functional", "resident")
    }
    assert largest_difference(*map(model, runs.values())) < 1e-4
    logs = [read_lines(run / "log.jsonl") for run in runs.values()]
    for one, other in zip(*logs, strict=True):
        assert math.isclose(one["lower_loss"], other["lower_loss"], rel_tol=1e-3)
        assert ("upper_loss" in one) == ("upper_loss" in other)
        assert math.isclose(one.get("upper_loss", 0), other.get("upper_loss", 0), rel_tol=1e-3)


@pytest.mark.parametrize("name", ["cold start", "baseline"])
def test_plain_training(task, tmp_path, name):
    runs = []
    for kind in ("functional", "resident"):
        if name == "cold start":
            runs.append(run_cold_start(task.cold_start(tmp_path / kind, execution=kind)))
        else:
            options = task.train(tmp_path / kind, weighting="none", execution=kind)
            runs.append(run_training(options))
    assert largest_difference(*map(model, runs)) < 1e-4


def test_small_models_keep_the_bits_of_the_functional_step(task, tmp_path):
    runs = [
        run_training(task.train(tmp_path / kind, execution=kind, **TABLE))
        for kind in ("auto", "functional")
    ]
    assert model_bits(runs[0]) == model_bits(runs[1])


@pytest.mark.parametrize("kind", [TABLE, NET, SINGLE], ids=["table", "net", "dot"])
def test_an_interrupted_run_is_the_uninterrupted_one(task, tmp_path, monkeypatch, kind):
    """Also of a net that reads the scores of the initial model, which the resumed one replaces."""
    kind = {"execution": "resident", "save_every": 2, "keep_checkpoints": 0, "steps": 6} | kind
    whole = run_training(task.train(tmp_path / "whole", **kind))
    original, calls = ResidentSolver.advance, []

    def advance(*arguments):
        calls.append(None)
        if len(calls) == 4:
            raise OSError("gone")
        return original(*arguments)

    monkeypatch.setattr(ResidentSolver, "advance", advance)
    options = task.train(tmp_path / "cut", **kind)
    with pytest.raises(Exception, match="gone"):
        run_training(options)
    monkeypatch.setattr(ResidentSolver, "advance", original)
    resumed = run_training(
        task.train(
            tmp_path / "cut", resume=str(tmp_path / "cut" / "checkpoints" / "step-2"), **kind
        )
    )
    assert model_bits(resumed) == model_bits(whole)
    state = "checkpoints/step-6/state.safetensors"
    assert (resumed / state).read_bytes() == (whole / state).read_bytes()


def test_a_step_that_fails_halfway_is_not_saved(task, tmp_path, monkeypatch):
    """θ has moved, φ has not: the run goes on from its last checkpoint."""
    calls = []

    def upper_loss(self, lower, upper, batch):
        calls.append(None)
        if len(calls) == 3:
            raise OSError("disk of the meta set is gone")
        return original(self, lower, upper, batch)

    original = Objective.upper_loss_and_scores
    monkeypatch.setattr(Objective, "upper_loss_and_scores", upper_loss)
    options = task.train(tmp_path / "run", execution="resident", save_every=1, **SINGLE)
    with pytest.raises(Exception, match="After a step that was not completed: the state is in"):
        run_training(options)
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == ["step-3", "step-4"]


def exploding(at):
    """A solver whose hypergradient norm at one call reads as an explosion."""
    original, calls = ResidentSolver.advance, []

    def advance(self, *arguments):
        state, infos = original(self, *arguments)
        calls.append(None)
        if len(calls) == at:
            norm = torch.tensor(1e30)
            infos = (*infos[:-1], infos[-1]._replace(hypergradient_norm=norm))
        assert isinstance(infos[-1], StepInfo)
        return state, infos

    return advance


def test_an_exploded_hypergradient_costs_its_upper_step_alone(task, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.run.trouble._ENOUGH", 2)
    monkeypatch.setattr(ResidentSolver, "advance", exploding(at=5))
    kind = {**SINGLE, "execution": "resident", "on_trouble": "skip", "save_every": 1}
    run = run_training(task.train(tmp_path / "run", keep_checkpoints=0, **kind))
    assert json.loads((run / "results.json").read_text())["troubles"] == {
        "hypergradient_exploded": 1
    }
    before, after = (
        load_file(run / "checkpoints" / f"step-{n}" / "state.safetensors") for n in (4, 5)
    )
    name = "state/upper_params/deviation"
    assert torch.equal(before[name], after[name])
    assert int(after["state/upper_steps"]) == int(before["state/upper_steps"])
    moved = [n for n in before if n.startswith("state/lower_params") and n in after]
    assert any(not torch.equal(before[n], after[n]) for n in moved)


def test_rollback_returns_to_the_beginning_where_there_is_no_checkpoint(
    task, tmp_path, monkeypatch
):
    """The state before the first step is on the disk, since it is no longer in memory."""
    monkeypatch.setattr("recipes.run.trouble._ENOUGH", 1)
    monkeypatch.setattr(ResidentSolver, "advance", exploding(at=4))
    seen = []
    original = loop.judge

    def judge(run, training, progress, state, infos):
        judged = original(run, training, progress, state, infos)
        theta = judged.progress.state.lower_params
        seen.append({name: leaf.clone() for name, leaf in theta.items()})
        return judged

    monkeypatch.setattr(loop, "judge", judge)
    kind = {**SINGLE, "execution": "resident", "on_trouble": "rollback", "save_every": 100}
    run = run_training(task.train(tmp_path / "run", **kind))
    start = load_file(run / "checkpoints" / "step-0" / "state.safetensors")
    for name, leaf in seen[3].items():
        assert torch.equal(leaf, start[f"state/lower_params/{name}"])
    assert any(not torch.equal(seen[2][name], leaf) for name, leaf in seen[3].items())


def test_a_parameter_that_is_not_finite_cannot_be_left_out(task, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.run.trouble._ENOUGH", 2)
    advance = exploding(at=5)

    def spoiled(self, *arguments):
        state, infos = advance(self, *arguments)
        if float(infos[-1].hypergradient_norm or 0.0) > 1e29:
            next(iter(state.lower_params.values())).fill_(math.nan)
        return state, infos

    monkeypatch.setattr(ResidentSolver, "advance", spoiled)
    kind = {**SINGLE, "execution": "resident", "on_trouble": "skip"}
    with pytest.raises(
        NonFiniteError, match="a lower parameter is not finite, and a step in place"
    ):
        run_training(task.train(tmp_path / "run", **kind))


def made(trained, **more):
    options = train_options(train_file="t", output_dir="o", meta_file="m", **TABLE, **more)
    weighting = make_weighting(options, 4, 0)
    objective = Objective(None, AGGREGATIONS["mean"], "both", weighting)
    return make_solver(options, objective, 0.1, trained)


def test_auto_takes_large_models_where_the_options_allow_it():
    assert type(made(RESIDENT_FROM - 1)) is BilevelSolver
    assert type(made(RESIDENT_FROM)) is ResidentSolver
    assert type(made(RESIDENT_FROM, rollback=True)) is BilevelSolver
    assert type(made(RESIDENT_FROM, execution="functional")) is BilevelSolver
    assert type(made(0, execution="resident")) is ResidentSolver
    options = train_options(train_file="t", output_dir="o", weighting="none")
    assert type(make_plain_solver(options, made(0).problem, RESIDENT_FROM)) is ResidentSolver
    assert type(make_plain_solver(options, made(0).problem, 1)) is BilevelSolver


def test_auto_route_of_single_examples_is_dot_in_place():
    single = {"batch_size": 1, "order": "lower-first", "direction_decay": 0.0}
    assert made(RESIDENT_FROM, **single).hypergradient == OneStep(Dot())
    assert made(0, **single).hypergradient != OneStep(Dot())


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"rollback": True}, "rollback, which goes back"),
        ({"hypergradient": "unrolled", "unroll_steps": 2}, "Unrolled, which keeps"),
        ({"order": "lower-first", "direction_decay": 0.0}, r"by the route Auto\(\)"),
    ],
)
def test_what_a_step_in_place_does_not_do_is_refused_by_name(options, found):
    sentence = f"--execution resident: .*{found}.* use --execution functional"
    with pytest.raises(OptionError, match=sentence):
        made(0, execution="resident", **options)


def test_several_ranks_step_in_place_upper_first(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert type(made(RESIDENT_FROM)) is ResidentSolver
    single = {"batch_size": 1, "order": "lower-first", "direction_decay": 0.0}
    assert type(made(RESIDENT_FROM, **single)) is BilevelSolver
    with pytest.raises(OptionError, match="order lower-first over several ranks cannot be done"):
        made(0, execution="resident", **single)
