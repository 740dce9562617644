"""A handful of kills; ``make chaos`` does many."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

from recipes.command_line import make_parser
from recipes.evidence.chaos import CASES, KILLS, SAVE_EVERY, SEED, Counts, Harness, chaos
from recipes.evidence.chaos_attempt import _is_change
from recipes.options.parse import resolve
from recipes.options.rules import check_together
from recipes.options.train import TrainOptions


def test_runs_that_are_killed_are_the_uninterrupted_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = chaos(tmp_path, kills=4, seed=3, cases=("net", "unrolled"))
    json.dumps(found, allow_nan=False)
    assert found["kills"] >= 4
    assert found["resumed"] == found["identical"] == found["kills"]
    assert found["runs_identical"] == found["runs"] >= 2
    assert found["lost_steps_max"] <= SAVE_EVERY + 1  # to the end of a window of two


class EndsWhileLookedAt:
    """A process that is there when it is looked at, and gone before anything can be done to it."""

    def __init__(self):
        self._process = multiprocessing.get_context("spawn").Process(target=os.getpid)

    def is_alive(self):
        self._process.join()
        return True

    def __getattr__(self, name):
        return getattr(self._process, name)


def test_a_process_that_ends_before_it_can_be_killed_has_ended(tmp_path):
    harness = Harness.__new__(Harness)
    harness.folder = tmp_path
    harness._context = SimpleNamespace(Process=lambda **_: EndsWhileLookedAt())
    found = harness.attempt(tmp_path, [], cpu=0.0)
    assert (found.killed, found.code) == (False, 0)


def given(words):
    found = vars(make_parser().parse_args(["train", *words.split()]))
    return {name: value for name, value in found.items() if name not in ("command", "options")}


def test_every_weighting_and_every_hypergradient_is_killed():
    seen = []
    for words in CASES.values():
        options = resolve(
            TrainOptions,
            {"train_file": "t", "meta_file": "m", "output_dir": "o", "save_every": SAVE_EVERY}
            | given(words),
        )
        check_together(options)
        seen.append((options.weighting.kind, options.hypergradient.kind))
    assert {weighting for weighting, _ in seen} == {"net", "table", "domain"}
    assert {method for _, method in seen} == {"one-step", "unrolled", "implicit", "penalty"}


def test_the_recorded_figures_are_of_the_default_command():
    record = json.loads((Path(__file__).parents[3] / "results" / "chaos.json").read_text())
    assert record["command"].endswith(f".chaos --kills {KILLS} --seed {SEED}")
    assert record["kills"] >= KILLS  # goes on to the end of a round of cases
    assert record["runs"] % len(CASES) == 0


def test_counts_add_up_and_the_larger_loss_stays():
    one, other = Counts(3, 1, 3, 2, 1, 0, 3), Counts(4, 0, 3, 1, 1, 1, 0)
    assert one + other == Counts(7, 1, 6, 2, 2, 1, 3)


def test_what_counts_as_a_change():
    run = "/runs/x"
    changes = [
        ("open", (f"{run}/log.jsonl", "a", 0)),
        ("open", (f"{run}/state", None, 0o102)),
        ("os.mkdir", (f"{run}/checkpoints", 511, -1)),
        ("os.rename", (f"{run}/a", f"{run}/b", -1, -1)),
    ]
    others = [
        ("open", (f"{run}/log.jsonl", "r", 0)),
        ("open", ("/elsewhere", "w", 0)),
        ("open", (3, "w", 0)),
        ("os.listdir", (run,)),
        ("import", ("x",)),
    ]
    assert all(_is_change(*event, run) for event in changes)
    assert not any(_is_change(*event, run) for event in others)
