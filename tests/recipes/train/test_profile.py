"""What ``--profile`` writes of the steps that it names."""

from __future__ import annotations

import json

import pytest

from recipes.profiling import STEP_PARTS
from recipes.train.cold_start import run_cold_start
from recipes.train.training import run_training


@pytest.fixture(scope="module")
def run(task, tmp_path_factory):
    directory = tmp_path_factory.mktemp("profile") / "run"
    options = {"weighting": "table", "bound": "clip", "steps": 5, "upper_start": 0}
    return run_training(
        task.train(directory, **options, route="central-difference", profile=3, log_every=5)
    )


def test_every_part_of_the_steps_is_counted(run):
    parts = json.loads((run / "profile" / "parts.json").read_text())
    assert tuple(parts) == STEP_PARTS
    for name, entry in parts.items():
        assert entry["calls"] == 3, name
        assert entry["host_seconds"] > 0
        assert entry["device_seconds"] == 0
    whole = sum(parts[name]["host_seconds"] for name in STEP_PARTS)
    assert parts["lower pass"]["host_seconds"] < whole


def test_the_trace_holds_the_parts_with_their_times(run):
    trace = json.loads((run / "profile" / "trace.json").read_text())
    parts = json.loads((run / "profile" / "parts.json").read_text())
    for name in STEP_PARTS:
        events = [e for e in trace["traceEvents"] if e.get("name") == name and e.get("ph") == "X"]
        events = [event for event in events if event.get("cat") == "user_annotation"]
        assert len(events) == 3, name
        seconds = sum(event["dur"] for event in events) / 1e6
        assert seconds == pytest.approx(parts[name]["host_seconds"], rel=0.05, abs=1e-3)


def test_the_table_is_printed_and_the_bits_are_the_same(task, tmp_path, capsys):
    plain = run_cold_start(task.cold_start(tmp_path / "plain"))
    assert not (plain / "profile").exists()
    capsys.readouterr()
    run = run_cold_start(task.cold_start(tmp_path / "run", profile=100))  # more than there are
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines() if "   " in line][:2] == [
        "profile",
        "data",
    ]
    assert "\nlower update " in printed
    assert "mixed product" not in printed
    parts = json.loads((run / "profile" / "parts.json").read_text())
    assert parts["lower pass"]["calls"] == 2  # of three, behind the first
    file = "model/model.safetensors"
    assert (run / file).read_bytes() == (plain / file).read_bytes()
