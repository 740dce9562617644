"""Loader processes change nothing but the time: same bits, same errors, also after a resume."""

from __future__ import annotations

import json
import shutil

import pytest

from recipes.options.parse import changed
from recipes.run.errors import StepError
from recipes.train.batches import ahead
from recipes.train.cold_start import run_cold_start
from recipes.train.training import run_training
from tests.tiny_task import altered, model_bits

FILES = ("weights.jsonl", "log.jsonl", "test_questions.jsonl")


def test_ahead_is_the_same_function():
    def batches(step):
        return [step, step * step]

    assert ahead(batches, 10, 0) is batches
    by_workers = ahead(batches, 20, 2, every=3)
    asked = [2, 5, 8, 10, 13, 16, 4, 7]  # a run whose upper steps shift, and one that goes back
    assert [by_workers(step) for step in asked] == [batches(step) for step in asked]


def test_runs_have_the_same_bits_with_workers(task, tmp_path):
    more = {"accumulation": 2, "batch_size": 3, "unroll_steps": 2, "steps": 6}
    alone = run_training(task.train(tmp_path / "alone", **more))
    with_workers = run_training(task.train(tmp_path / "workers", workers=2, save_every=3, **more))
    assert model_bits(with_workers) == model_bits(alone)
    for name in FILES:
        assert (with_workers / name).read_bytes() == (alone / name).read_bytes()
    # As if it had been killed after the step 3, and gone on with another number.
    (with_workers / "results.json").unlink()
    shutil.rmtree(with_workers / "model")
    shutil.rmtree(with_workers / "checkpoints" / "step-6")
    options = changed(
        task.train(with_workers, save_every=3, **more), resume=str(with_workers), workers=1
    )
    resumed = run_training(options)
    assert model_bits(resumed) == model_bits(alone)
    for name in FILES:
        assert (resumed / name).read_bytes() == (alone / name).read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_an_image_that_goes_bad_in_the_run_is_named(task, tmp_path, monkeypatch, workers, damage):
    images = tmp_path / "images"
    shutil.copytree(task.data, images)
    rows = [json.loads(line) for line in (images / "train.jsonl").read_text().splitlines()]
    bad = images / rows[0]["images"][0]
    altered(images / "train.jsonl", tmp_path / "train.jsonl", lambda place, row: row)

    def spoil(*given):
        if damage == "gone":
            bad.unlink()
        else:
            bad.write_bytes(bad.read_bytes()[:-200])
        return given[0]

    monkeypatch.setattr("recipes.train.cold_start.require", spoil)
    options = task.cold_start(
        tmp_path / "run", train_file=str(tmp_path / "train.jsonl"), workers=workers, draw=0, steps=9
    )
    with pytest.raises(StepError, match=f"{bad.name}.* (no such file|truncated)"):
        run_cold_start(options)
