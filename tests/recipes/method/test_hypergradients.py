"""Runs with every hypergradient: what is taken, and that an interrupted one is the whole one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bilevel import (
    Auto,
    BilevelSolver,
    ConjugateGradient,
    Implicit,
    Neumann,
    Nystrom,
    OneStep,
    Penalty,
    Unrolled,
)
from recipes.method.bounded_weights import make_weighting
from recipes.method.hypergradients import differentiated_steps, make_hypergradient
from recipes.method.time_scale import time_scale
from recipes.options.parse import changed, resolve, train_options
from recipes.options.rules import check_together
from recipes.options.train import TrainOptions
from recipes.options.values import OptionError
from recipes.train.training import run_training
from tests.recipes.options.recorded import where_read
from tests.tiny_task import FORWARD_MODE, model_bits, read_lines

pytestmark = FORWARD_MODE

BASE = train_options(train_file="t", output_dir="o", meta_file="m", lower_weight_decay=0.0)
TABLE = {"weighting": "table", "bound": "clip"}
NET = {"weighting": "net"}
DOMAIN = {"weighting": "domain", "bound": "softplus"}
FAMILIES = {
    "unrolled, table": {"hypergradient": "unrolled", "unroll_steps": 2, **TABLE},
    "unrolled, net": {"hypergradient": "unrolled", "unroll_steps": 3, "rollback": True, **NET},
    "unrolled, domain": {
        "hypergradient": "unrolled",
        "unroll_steps": 2,
        "batch_size": 3,
        "accumulation": 2,
        **DOMAIN,
    },
    "implicit, net": {
        "hypergradient": "implicit",
        "solver_iterations": 2,
        "lower_weight_decay": 0.0,
        **NET,
    },
    "implicit, table": {
        "hypergradient": "implicit",
        "linear_solver": "cg",
        "solver_iterations": 2,
        "damping": 10.0,
        "unroll_steps": 2,
        "batch_size": 3,
        "accumulation": 2,
        "lower_weight_decay": 0.0,
        **TABLE,
    },
    "held upper gradient, net": {"upper_gradient_every": 3, "upper_start": 1, **NET},
    "penalty, domain": {"hypergradient": "penalty", "unroll_steps": 2, **DOMAIN},
    "penalty, table": {
        "hypergradient": "penalty",
        "unroll_steps": 3,
        "batch_size": 3,
        "accumulation": 2,
        **TABLE,
    },
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_interrupted_run_is_the_uninterrupted_one(task, tmp_path, monkeypatch, kind):
    options = task.train(
        tmp_path / "whole", steps=8, log_every=3, save_every=2, keep_checkpoints=0, **FAMILIES[kind]
    )
    whole = run_training(options)
    original = BilevelSolver.advance

    def interrupting(self, state, *rest):
        if int(state.lower_steps) >= 5:
            raise KeyboardInterrupt
        return original(self, state, *rest)

    monkeypatch.setattr(BilevelSolver, "advance", interrupting)
    with pytest.raises(KeyboardInterrupt):
        run_training(replace(options, output_dir=str(tmp_path / "run")))
    monkeypatch.undo()
    run = run_training(resolve(TrainOptions, {"resume": str(tmp_path / "run")}))
    assert model_bits(run) == model_bits(whole)
    for name in ("log.jsonl", "weights.jsonl", "test_questions.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    params = "weighting/params.safetensors"
    assert (run / params).read_bytes() == (whole / params).read_bytes()
    saved = {path.name for path in (whole / "checkpoints").iterdir()}
    assert saved == {path.name for path in (run / "checkpoints").iterdir()}
    if kind == "unrolled, net":  # windows end at 4 and 7; what is left is taken step by step
        assert saved == {"step-4", "step-7", "step-8"}


def test_a_run_is_taken_up_at_a_named_checkpoint(task, tmp_path, capsys):
    options = task.train(tmp_path / "run", steps=5, save_every=1, keep_checkpoints=0)
    run = run_training(options)
    bits, log = model_bits(run), (run / "log.jsonl").read_bytes()
    (run / "results.json").unlink()
    resumed = run_training(
        resolve(
            TrainOptions, {"resume": str(run / "checkpoints" / "step-2"), "keep_checkpoints": 2}
        )
    )
    assert resumed == run
    assert (model_bits(run), (run / "log.jsonl").read_bytes()) == (bits, log)
    assert (
        "resumed after 2 of 5 lower steps; removed step-3, step-4, step-5, which come again\n"
        in capsys.readouterr().out
    )
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-4", "step-5"}


def test_figures_of_the_hypergradient_are_logged(task, tmp_path):
    run = run_training(task.train(tmp_path / "run", **FAMILIES["implicit, net"]))
    first, *later = read_lines(run / "log.jsonl")
    assert not any(name.startswith("hypergradient/") for name in first)
    for entry in later:
        assert {"hypergradient/residual", "hypergradient/iterations", "hypergradient/products"} <= (
            set(entry)
        )
        stationarity = entry["hypergradient/stationarity"]  # null: infinite
        far = any("far from stationary" in note for note in entry.get("notes", []))
        assert far == (stationarity is None or stationarity > 0.01)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"hypergradient": "one-step", "direction_decay": 0.5}, OneStep(direction_decay=0.5)),
        (
            {"upper_gradient_every": 4, "order": "upper-first"},
            OneStep(Auto(), "upper-first", 0.9, upper_gradient_every=4),
        ),
        ({"hypergradient": "unrolled"}, Unrolled()),
        ({"hypergradient": "implicit"}, Implicit(Nystrom(10, 0.1))),
        (
            {"hypergradient": "implicit", "linear_solver": "nystrom", "solver_iterations": 3},
            Implicit(Nystrom(3, 0.1)),
        ),
        (
            {"hypergradient": "implicit", "linear_solver": "cg", "damping": 0.5},
            Implicit(ConjugateGradient(10, damping=0.5)),
        ),
        (
            {"hypergradient": "implicit", "linear_solver": "neumann", "damping": 0.5},
            Implicit(Neumann(10, damping=0.5)),
        ),
        ({"hypergradient": "penalty", "penalty_strength": 4.0}, Penalty(4.0)),
    ],
)
def test_options_become_the_hypergradient(given, expected):
    options = where_read(BASE, **{"order": "lower-first"} | given)
    assert make_hypergradient(options.hypergradient) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"hypergradient": "unrolled", "route": "jvp", "order": "lower-first"},
            "--route jvp, --order lower-first have no effect with --hypergradient unrolled: leave "
            "them out, or use --hypergradient one-step",
        ),
        (
            {"hypergradient": "penalty", "direction_decay": 0.0},
            "--direction-decay 0.0 has no effect with --hypergradient penalty: leave it out, or "
            "use --hypergradient one-step",
        ),
        (
            {"order": "lower-first", "upper_gradient_every": 2},
            "--upper-gradient-every 2 has no effect with --order lower-first: leave it out, or use "
            "--order upper-first",
        ),
        (
            {"linear_solver": "cg", "solver_iterations": 2, "damping": 1.0},
            "--linear-solver cg, --solver-iterations 2, --damping 1.0 have no effect with "
            "--hypergradient one-step: leave them out, or use --hypergradient implicit",
        ),
        (
            {"penalty_strength": 2.0},
            "--penalty-strength 2.0 has no effect with --hypergradient one-step: leave it out, or "
            "use --hypergradient penalty",
        ),
        (
            {"hypergradient": "implicit", "lower_weight_decay": 0.01},
            "--hypergradient implicit --lower-weight-decay 0.01: weight decay moves the point that "
            "the implicit hypergradient assumes: use --lower-weight-decay 0, or another "
            "hypergradient",
        ),
        (
            {"on_trouble": "rollback"},
            "--on-trouble rollback --save-every 0: rollback returns to a checkpoint: use "
            "--save-every 1 or more, or --on-trouble skip",
        ),
    ],
)
def test_settings_of_another_hypergradient_are_refused(given, message):
    with pytest.raises(OptionError) as error:
        check_together(changed(BASE, **given))
    assert str(error.value) == message


def test_a_window_visits_all_instances_that_its_hypergradient_sees():
    options = changed(BASE, steps=20, upper_start=0, batch_size=2, unroll_steps=4, **TABLE)
    found = {}
    for name in ("one-step", "unrolled", "implicit", "penalty"):
        given = changed(options, hypergradient=name)
        found[name] = (
            differentiated_steps(given),
            time_scale(given, make_weighting(given, 40, 0), 40, lambda: None).visits,
        )
    # Five upper steps, which see 2 or 8 of 40 rows each.
    assert found == {
        "one-step": (1, 0.25),
        "unrolled": (4, 1.0),
        "implicit": (1, 0.25),
        "penalty": (4, 1.0),
    }


@pytest.mark.parametrize("workers", [0, 1])
def test_meta_batches_are_made_for_the_upper_steps_that_read_them(task, tmp_path, workers):
    """Of 8 steps, upper steps after all but the first, the fifth of them with a v of its own."""
    steps = {"steps": 8, "log_every": 1, "upper_start": 1, "workers": workers, **NET}
    held = run_training(task.train(tmp_path / "held", upper_gradient_every=4, **steps))
    fresh = run_training(task.train(tmp_path / "fresh", **steps))
    computed = [line["step"] for line in read_lines(held / "log.jsonl") if "upper_loss" in line]
    assert computed == [2, 6]
    every = read_lines(fresh / "log.jsonl")
    assert [line["step"] for line in every if "upper_loss" in line] == [*range(2, 9)]
    first, second = (read_lines(run / "log.jsonl")[1] for run in (held, fresh))
    assert first == second  # the same meta batch at the same θ
