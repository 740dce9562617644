"""The soak run's harness: it finds what grows, and a short run goes through."""

from __future__ import annotations

import gc
import json

import numpy as np
import pytest

from recipes.evidence.soak import Sample, report, sample, soak
from recipes.train.training import run_training


def samples(leak=0.0, files=0.0, slower=0.0, count=400):
    noise = np.random.default_rng(0).normal(size=(count, 2))
    cpu, made = 0.0, []
    for place in range(count):
        step = 50 * (place + 1)
        cpu += 50 * (0.004 + slower * step) * (1 + 0.05 * noise[place, 1])
        made.append(Sample(step, 500 + noise[place, 0] + leak * step, round(8 + files * step), cpu))
    return made


def test_a_line_is_found_exactly():
    made = [Sample(step, 100 + 0.5 * step, 7, 0.01 * step) for step in range(1, 401)]
    trends = report(made)["trends"]
    assert trends["rss_mib"]["slope_per_1000_steps"] == pytest.approx(500)
    assert trends["rss_mib"]["high"] - trends["rss_mib"]["low"] == pytest.approx(0, abs=1e-5)
    assert trends["cpu_ms_per_step"]["mean"] == pytest.approx(10)
    assert trends["open_files"] == pytest.approx(
        dict.fromkeys(trends["open_files"], 0.0) | {"mean": 7.0}
    )
    assert report(made)["grows"] == ["rss_mib"]


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ({}, []),
        ({"leak": 0.001}, ["rss_mib"]),  # 1 KiB a step: 20 MiB of 500
        ({"files": 0.0005}, ["open_files"]),
        ({"slower": 1e-7}, ["cpu_ms_per_step"]),
        ({"leak": 0.0001}, []),  # 2 MiB in 20,000 steps is below the limit
    ],
)
def test_growth_is_told_from_noise(faults, expected):
    assert report(samples(**faults))["grows"] == expected


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="at least 40 samples, found 10"):
        report(samples(count=10))


def test_a_sample_is_of_this_process():
    gc.collect()  # what earlier tests left is not given back between the two samples
    first = sample(1)
    held = np.ones(2**24)
    with open("/dev/null") as file:
        second = sample(2)
        assert not file.closed
    assert second.rss_mib - first.rss_mib > 100
    assert second.open_files == first.open_files + 1
    assert second.cpu > first.cpu
    assert held.sum() == 2**24


def test_the_run_itself_says_when_a_line_is_written(task, tmp_path):
    """In the run's thread: no line is missed, however little time passes before the run ends."""
    run, seen = tmp_path / "run", []

    def look(step):
        lines = (run / "log.jsonl").read_text(encoding="utf-8").split("\n")
        seen.append((step, json.loads(lines[-2])["step"], lines[-1]))

    run_training(task.train(run, steps=7, log_every=3), logged=look)
    assert seen == [(step, step, "") for step in (3, 6, 7)]


def test_a_run_that_writes_its_log_and_ends_at_once_is_seen_to_its_end(tmp_path, monkeypatch):
    """Nothing of the harness gets to run in between."""

    def whole(options, logged=None):
        (tmp_path / "run").mkdir()
        lines = [json.dumps({"step": step}) + "\n" for step in range(1, 101)]
        (tmp_path / "run" / "log.jsonl").write_text("".join(lines), encoding="utf-8")
        if logged is not None:
            for step in range(1, 101):
                logged(step)

    monkeypatch.setattr("recipes.soak._options", lambda *_: None)
    monkeypatch.setattr("recipes.train.training.run_training", whole)
    found = soak(tmp_path, 100)
    assert (found["steps"], found["samples"]) == (100, 100)


def test_three_hundred_steps(tmp_path):
    found = soak(tmp_path, 300)
    assert found["steps"] == 300
    assert found["samples"] == 300  # every line of the log, the last ones too
    assert set(found["trends"]) == {"rss_mib", "open_files", "cpu_ms_per_step"}
    assert found["trends"]["open_files"]["growth"] < 0.05
    assert "open_files" not in found["grows"]
