"""Scores of the training set are read by a second run, and made again when anything changed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

import recipes.train.training
from prm.models.model import load_prm
from recipes.evaluation.kept_scores import NOT_SCORING, initial_score_cache, kept_scores
from recipes.models.frozen import CACHE
from recipes.models.loading import read_examples
from recipes.options.base import ScoringOptions
from recipes.options.flat import flat_options
from recipes.options.parse import changed
from recipes.options.values import OptionError
from recipes.run.identity import identity
from recipes.train.cold_start import run_cold_start
from recipes.train.training import run_training
from tests.tiny_task import model_bits


@pytest.fixture
def scored(monkeypatch):
    """The runs that have scored the training set themselves."""
    runs: list[str] = []
    real = recipes.train.training.step_scores_of

    def counting(prm, params, data, options, **more):
        runs.append(options.output_dir)
        return real(prm, params, data, options, **more)

    monkeypatch.setattr(recipes.train.training, "step_scores_of", counting)
    return runs


@pytest.mark.parametrize("features", [True, False])  # read by steps, or reported after them
def test_a_second_run_reads_the_scores_and_has_the_same_bits(task, tmp_path, scored, features):
    run = partial(
        task.train,
        cache_dir=str(tmp_path / "kept"),
        weighting="net",
        reference_features=features,
        steps=2,
    )
    first = run_training(run(tmp_path / "first"))
    loaded = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes.train.training, "_initial_model", loaded.append)
        second = run_training(run(tmp_path / "second"))
    assert scored == [str(first)]
    assert not loaded
    assert model_bits(second) == model_bits(first)
    assert (second / "weights.jsonl").read_bytes() == (first / "weights.jsonl").read_bytes()
    assert "initial_loss" in (second / "weights.jsonl").read_text()
    assert not (second / CACHE).exists()


def test_a_resumed_run_reads_its_own(task, tmp_path, scored):
    options = task.train(tmp_path / "run", weighting="net", save_every=2)
    run = run_training(options)
    (run / "results.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-4")
    bits = model_bits(run)
    run_training(changed(options, resume=str(run)))
    assert scored == [str(run)]
    assert model_bits(run) == bits
    assert len(list((run / CACHE).rglob("*.safetensors"))) == 1


@pytest.mark.parametrize("change", ["model", "labels", "lines", "system_prompt", "max_patches"])
def test_what_changes_scores_is_scored_again(task, tmp_path, scored, change):
    kept = {"cache_dir": str(tmp_path / "kept"), "weighting": "net", "steps": 1}
    run_training(task.train(tmp_path / "first", **kept))
    more = {}
    lines = (task.data / "train.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["images"] = [str(task.data / image) for image in row["images"]]
    if change == "model":
        start = run_cold_start(task.cold_start(tmp_path / "start", steps=1))
        more["init_from"] = str(start / "model")
    elif change == "labels":
        rows[0]["steps"][0]["label"] = "-" if rows[0]["steps"][0]["label"] == "+" else "+"
    elif change == "lines":
        rows.append(rows.pop(0))
    elif change == "system_prompt":
        more["system_prompt"] = "judge"
    else:
        more["max_patches"] = 1
    if change in ("labels", "lines"):
        file = tmp_path / "train.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        more["train_file"] = str(file)
    run_training(task.train(tmp_path / "second", **kept, **more))
    assert len(scored) == 2


def test_the_fingerprint_is_of_every_option_of_scoring(task, tmp_path):
    prm = load_prm(task.model)
    base = task.train(tmp_path / "run", weighting="net")
    data = read_examples(prm, base, base.train_file)
    known = identity(base, prm.model, {"train_file": data.pictures})

    def fingerprint(options=base, prm=prm, data=data, **more) -> str:
        folder = tmp_path / "kept"
        return initial_score_cache(prm, data, options, {**known, **more}, folder).fingerprint

    first = fingerprint()
    assert fingerprint(changed(base, lower_lr=1.0, seed=5)) == first
    others = {
        "context": "gold",
        "eval_batch_size": 3,
        "max_patches": 2,
        "system_prompt": "other",
        "tokens_per_batch": 100,
        "too_long": "truncate",
    }
    assert set(flat_options(ScoringOptions)) == {*others, *NOT_SCORING}
    found = {name: fingerprint(changed(base, **{name: value})) for name, value in others.items()}
    found["data"] = fingerprint(data=data.only(range(3)))
    found["model"] = fingerprint(model="another")
    found["autocast"] = fingerprint(prm=replace(prm, autocast=torch.bfloat16))
    prm.tokenizer.add_tokens(["unheard"])
    found["tokenizer"] = fingerprint()
    prm.tokenizer.chat_template += " "
    found["template"] = fingerprint()
    prm.image_processor.image_mean = [0.1, 0.2, 0.3]
    found["image processor"] = fingerprint()
    assert len({first, *found.values()}) == 1 + len(found)


def test_damaged_scores_are_made_again(task, tmp_path, capsys):
    prm = load_prm(task.model)
    options = task.train(tmp_path / "run", weighting="net")
    data = read_examples(prm, options, options.train_file)
    known = identity(options, prm.model, {"train_file": data.pictures})
    cache = initial_score_cache(prm, data, options, known, tmp_path / "kept")
    made = (torch.tensor([[0.25, 0.5]]), torch.tensor([[True, False]]))
    calls = []

    def score():
        calls.append(1)
        return made

    for _ in range(2):
        assert all(map(torch.equal, kept_scores(cache, score), made))
    assert len(calls) == 1
    (path,) = cache.place.iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert all(map(torch.equal, kept_scores(cache, score), made))
    assert len(calls) == 2
    assert "damaged" in capsys.readouterr().out
    assert all(map(torch.equal, kept_scores(None, score), made))
    assert len(calls) == 3


def test_a_folder_that_nothing_is_kept_in_is_refused(task, tmp_path):
    options = task.train(tmp_path / "run", weighting="table", bound="clip", initial_loss=False)
    with pytest.raises(OptionError, match="--cache-dir"):
        run_training(changed(options, cache_dir=str(tmp_path / "kept")))
