"""Runs that learn labels: what they write, resume, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recipes import commands
from recipes.__main__ import main
from recipes.options.parse import changed
from recipes.options.rules import check_together
from recipes.options.use import WeighOptions
from recipes.options.values import OptionError
from recipes.run.errors import Stopped
from recipes.train.training import run_training
from tests.tiny_task import altered, model_bits, read_lines
from weighting import load_weighting


@pytest.fixture(scope="module")
def options(task, tmp_path_factory):
    """Examples of three to five steps, of which one has a step without a label and a soft one."""
    folder = tmp_path_factory.mktemp("labels")

    def unequal(place, row):
        steps = row["steps"][: len(row["steps"]) - place % 3]
        if place == 1:
            steps[0]["label"], steps[1]["label"] = None, 0.25
        return row | {"steps": steps}

    train = altered(task.data / "train.jsonl", folder / "train.jsonl", unequal)
    made = task.train(folder / "run", weighting="labels", test_file=None, save_every=2)
    return replace(made, train_file=str(train))


@pytest.fixture(scope="module")
def run(options):
    return run_training(options)


def test_labels_are_written_as_the_weighting_has_them(options, run):
    weighting, params, names, _ = load_weighting(run / "weighting")
    assert weighting.steps == 5
    rows = read_lines(run / "labels.jsonl")
    assert [row["id"] for row in rows] == list(names)
    turned = 0
    for row, example in zip(rows, read_lines(Path(options.train_file)), strict=True):
        labels = [step["label"] for step in example["steps"]]
        given = [{"+": 1.0, "-": 0.0}.get(label, label) for label in labels]
        assert row["given"] == given
        for step, (y, q) in enumerate(zip(given, row["learned"], strict=True)):
            if y is None:
                assert q is None
                continue
            start = 0.1 + 0.8 * y
            phi = float(params["deviation"][names.index(row["id"]), step])
            odds = start / (1 - start) * float(torch.tensor(phi).exp())
            assert q == pytest.approx(odds / (1 + odds), rel=1e-5)
            turned += (q > 0.5) != (y > 0.5)
    results = json.loads((run / "results.json").read_text())
    steps = sum(label is not None for row in rows for label in row["given"])
    assert results["labels"]["steps"] == steps
    assert results["labels"]["turned_over"] == turned
    assert sum(results["labels"]["turned_over_by_source"].values()) == turned
    weights = read_lines(run / "weights.jsonl")
    moved = [
        abs(q - (0.1 + 0.8 * y)) for y, q in zip(rows[0]["given"], rows[0]["learned"], strict=True)
    ]
    assert weights[0]["weight"] == pytest.approx(1 - sum(moved) / len(moved), abs=1e-6)


def test_weigh_gives_the_weights_of_the_run(options, run, tmp_path):
    output = tmp_path / "w.jsonl"
    asked = WeighOptions(
        weighting=str(run / "weighting"),
        file=options.train_file,
        output=str(output),
        allow_outside_images=True,
    )
    assert commands.run("weigh", asked) == 0
    expected = read_lines(run / "weights.jsonl")
    assert [row["weight"] for row in read_lines(output)] == [row["weight"] for row in expected]


def test_the_page_shows_the_labels_that_moved_most(options, run, capsys):
    assert main(["weights", str(run), "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("moved most"))
    each = [
        (abs(q - y), row["id"], step)
        for row in read_lines(run / "labels.jsonl")
        for step, (y, q) in enumerate(zip(row["given"], row["learned"], strict=True), start=1)
        if y is not None
    ]
    most = sorted(each, key=lambda label: -label[0])[:3]
    shown = [line.split() for line in lines[start + 1 : start + 4]]
    assert [(row[4], int(row[3])) for row in shown] == [(name, step) for _, name, step in most]


def test_resumes_bit_for_bit(options, run, tmp_path, monkeypatch):
    again = changed(options, output_dir=str(tmp_path / "again"))

    def stop_after(step):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises((Stopped, KeyboardInterrupt)):
        run_training(again, stop_after)
    resumed = run_training(changed(again, resume=str(tmp_path / "again")))
    assert model_bits(resumed) == model_bits(run)
    for name in ("labels.jsonl", "weights.jsonl", "weighting/params.safetensors"):
        assert (resumed / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"route": "ghost"}, "--route ghost: this route has one product for all steps"),
        ({"route": "dot", "batch_size": 1}, "labels need one for each: use auto"),
        ({"sharding": "full", "batch_size": 1}, "labels: not shown to be right over shards"),
        ({"weighting": "table", "label_trust": 0.8}, "--label-trust 0.8 has no effect with"),
        ({"bound": "clip"}, "--bound clip has no effect with --weighting labels"),
        ({"normalise": "none"}, "--normalise none has no effect with --weighting labels"),
        ({"prior": 0.5}, "--prior 0.5 has no effect with --weighting labels"),
    ],
)
def test_what_labels_do_not_take_is_refused(task, tmp_path, given, message):
    with pytest.raises(OptionError, match=message):
        check_together(task.train(tmp_path / "run", **{"weighting": "labels", **given}))


def test_a_trust_that_says_nothing_is_refused(options, tmp_path):
    nothing = changed(options, label_trust=0.5, output_dir=str(tmp_path / "run"))
    with pytest.raises(OptionError, match=r"--label-trust 0\.5: .*above 0\.5"):
        run_training(nothing)
