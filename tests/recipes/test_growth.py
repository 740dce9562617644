"""What a command takes before its first step, and for each row: little, whatever the rows hold."""

from __future__ import annotations

import gc
import gzip
import json
import tracemalloc
from pathlib import Path

import pytest
import torch

import recipes.train.training
import recipes.use.score
from prm.data.reader import read_examples as read_at_once
from prm.inputs.prompt import PromptEncoder
from recipes.__main__ import main
from recipes.embedded.vocabulary import SYSTEM_PROMPT
from recipes.evaluation.candidates import step_scores_of
from recipes.models.loading import load_model, read_examples
from recipes.options.parse import changed
from recipes.options.use import ScoreOptions
from recipes.run.errors import RunError, StepError
from recipes.train.training import run_training
from recipes.use.score import run_score
from tests.tiny_task import altered, model_bits, read_lines


class Reached(Exception):
    """The first step."""


@pytest.fixture
def tokenised(monkeypatch) -> list[str]:
    """The ids of the examples that are tokenised, in order, without those that probe a layout."""
    seen: list[str] = []
    original = PromptEncoder.encode_many

    def noted(self, examples, images):
        seen.extend(example.id for example in examples if example.id != "probe")
        return original(self, examples, images)

    monkeypatch.setattr(PromptEncoder, "encode_many", noted)
    return seen


@pytest.mark.parametrize("weighting", ["table", "domain", "none"])
def test_nothing_is_tokenised_before_the_first_step(
    task, tmp_path, monkeypatch, tokenised, weighting
):
    def stop(*parts):
        raise Reached

    monkeypatch.setattr(recipes.train.training, "train", stop)
    with pytest.raises(Reached):
        run_training(task.train(tmp_path / "run", weighting=weighting))
    assert tokenised == []


def test_a_batch_is_tokenised_when_it_is_made_and_equal_to_one_of_examples_in_memory(
    task, tmp_path, tokenised
):
    options = task.train(tmp_path / "run")
    prm, _ = load_model(options)
    data = read_examples(prm, options, options.train_file)
    assert tokenised == []
    rows = [4, 0, 4, 11]
    batch = data.batch(rows)
    examples = read_at_once(Path(options.train_file))
    assert tokenised == [examples[row].id for row in (4, 0, 11)]
    data.batch([0, 5])
    assert tokenised[3:] == [examples[5].id]  # the others are kept
    expected = data.collator([examples[row] for row in rows])
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(batch[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("pack", ["gz", "array"])
def test_a_run_on_a_packed_file_has_the_bits_of_one_on_its_lines(task, tmp_path, pack):
    plain = altered(task.data / "train.jsonl", tmp_path / "train.jsonl", lambda _, row: row)
    packed = tmp_path / "packed"
    if pack == "gz":
        packed.write_bytes(gzip.compress(plain.read_bytes()))
    else:
        packed.write_text(json.dumps(read_lines(plain), indent=1))
    runs = [
        run_training(
            task.train(
                tmp_path / f"run-{name.name}", train_file=str(name), workers=workers, steps=3
            )
        )
        for name, workers in ((plain, 0), (packed, 1))
    ]
    assert model_bits(runs[0]) == model_bits(runs[1])
    assert (runs[0] / "weights.jsonl").read_bytes() == (runs[1] / "weights.jsonl").read_bytes()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_file_that_changes_during_a_run_ends_it_with_its_name(task, tmp_path, workers):
    """The rows are exchanged after the first step; once they are back the run goes on."""
    file = altered(task.data / "train.jsonl", tmp_path / "train.jsonl", lambda _, row: row)
    content = file.read_bytes()
    options = task.train(tmp_path / "run", train_file=str(file), workers=workers, steps=12)

    def change(step: int) -> None:
        if step == 1:
            file.write_bytes(b"".join(reversed(content.splitlines(keepends=True))))

    with pytest.raises(StepError, match=r"train\.jsonl:\d+: expected the row that was") as caught:
        run_training(options, change)
    assert "put it back, or start again" in str(caught.value)
    assert "the state is in" in str(caught.value)
    file.write_bytes(content)
    resumed = run_training(changed(options, resume=options.output_dir))
    whole = run_training(changed(options, output_dir=str(tmp_path / "whole")))
    assert model_bits(resumed) == model_bits(whole)


def test_initial_losses_are_those_of_the_model_before_training(task, tmp_path):
    """Scored after training for a table, before it for the net's features: the same numbers."""
    losses = {}
    for weighting in ("table", "net"):
        run = run_training(task.train(tmp_path / weighting, weighting=weighting, steps=2))
        losses[weighting] = [row["initial_loss"] for row in read_lines(run / "weights.jsonl")]
    assert losses["table"] == losses["net"]


@pytest.mark.parametrize("weighting", ["table", "net"])
def test_a_run_can_do_without_initial_losses(task, tmp_path, monkeypatch, weighting):
    scored = []

    def noted(prm, params, data, options):
        scored.append(data.path.name)
        return step_scores_of(prm, params, data, options)

    monkeypatch.setattr(recipes.train.training, "step_scores_of", noted)
    options = task.train(tmp_path / "run", weighting=weighting, steps=2, initial_loss=False)
    rows = read_lines(run_training(options) / "weights.jsonl")
    assert set(rows[0]) == {"id", "weight", "raw_weight", "visits"}
    assert scored == ([] if weighting == "table" else ["train.jsonl"])


def test_an_initial_model_that_changed_during_the_run_is_named(task, tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    for file in task.model.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(recipes.train.training, "digest_model", lambda model: "other")
    options = task.train(tmp_path / "run", model=str(model), weighting="table", steps=2)
    with pytest.raises(RunError, match=r"--model .*model: changed since the run began") as caught:
        run_training(options)
    assert "resume with --no-initial-loss" in str(caught.value)
    resumed = changed(options, resume=options.output_dir, initial_loss=False)
    assert (run_training(resumed) / "results.json").exists()


def test_no_initial_loss_has_no_effect_without_a_weighting(task, tmp_path):
    words = ["train", "--weighting", "none", "--no-initial-loss", "--train-file", "x"]
    assert main([*words, "--output-dir", str(tmp_path / "run")]) == 2


def text_rows(path: Path, rows: int) -> Path:
    """Rows of some 700 bytes without pictures, with words that the embedded model knows."""
    with path.open("w") as file:
        for number in range(rows):
            steps = [{"text": "the red circle is left of the blue square", "label": "+"}] * 4
            row = {"id": f"row-{number:07}", "question": "which is left? " * 20, "steps": steps}
            file.write(json.dumps(row | {"group": f"q{number // 8}", "domain": "d"}) + "\n")
    return path


def held_and_peak(work) -> tuple[int, int]:
    """Bytes of Python objects that ``work`` leaves and takes."""
    gc.collect()
    tracemalloc.start()
    try:
        result = work()
        gc.collect()
        held, peak = tracemalloc.get_traced_memory()
        del result
    finally:
        tracemalloc.stop()
    return held, peak


def test_a_training_row_takes_two_hundred_bytes(task, tmp_path):
    """The outline, ids and lines; rows as such take 700, and tokenised ones took 2,900."""
    options = task.train(tmp_path / "run")
    prm, _ = load_model(options)
    found = {}
    for rows in (600, 2_600):
        path = str(text_rows(tmp_path / "rows.jsonl", rows))
        read_examples(prm, options, path)
        held, peak = held_and_peak(lambda path=path: read_examples(prm, options, path))
        assert peak - held < 4e6
        found[rows] = held
    assert (found[2_600] - found[600]) / 2_000 < 200


def test_scoring_takes_no_more_memory_for_more_rows(task, tmp_path, monkeypatch):
    """Beyond the outline of the file: a window of rows is held. The model costs time only."""
    monkeypatch.setattr(recipes.use.score, "WINDOW", 1)
    monkeypatch.setattr(
        recipes.use.score,
        "score_rows",
        lambda prm, params, encoded, *rest, **more: [
            torch.full((len(row.label_positions),), 0.5) for row in encoded
        ],
    )
    peaks = {}
    for rows in (60, 200, 800):  # the first fills caches
        options = ScoreOptions(
            model=str(task.model),
            system_prompt=SYSTEM_PROMPT,
            file=str(text_rows(tmp_path / "rows.jsonl", rows)),
            output=str(tmp_path / f"scores-{rows}.jsonl"),
            eval_batch_size=16,
        )
        peaks[rows] = held_and_peak(lambda options=options: run_score(options))[1]
        assert len(read_lines(Path(options.output))) == rows
    assert (peaks[800] - peaks[200]) / 600 < 400


def test_batches_of_few_tokens_have_the_same_scores(task, tmp_path, monkeypatch):
    sizes: list[tuple[int, int]] = []
    import prm.scoring

    original = prm.scoring.step_logits

    def noted(model, params, batch, **more):
        sizes.append(tuple(batch["input_ids"].shape))
        return original(model, params, batch, **more)

    monkeypatch.setattr(prm.scoring, "step_logits", noted)
    scores = {}
    for limit in (2**16, 300):
        sizes.clear()
        options = ScoreOptions(
            model=str(task.model),
            system_prompt=SYSTEM_PROMPT,
            file=str(task.data / "test.jsonl"),
            output=str(tmp_path / f"{limit}.jsonl"),
            tokens_per_batch=limit,
        )
        scores[limit] = [row["step_scores"] for row in read_lines(run_score(options))]
        assert all(rows * seq <= limit for rows, seq in sizes)
        # One pass of trees, and one of what shares nothing.
        assert len(sizes) == 2 if limit > 300 else len(sizes) > 2
    for one, other in zip(*scores.values(), strict=True):
        assert one == pytest.approx(other, abs=1e-6)


def test_tokens_per_batch_has_no_effect_on_scores_that_are_there(tmp_path, capsys):
    words = ["evaluate", "--file", "x", "--scores", "y", "--tokens-per-batch", "100"]
    assert main(words) == 2
    assert "--tokens-per-batch: no effect with --scores" in capsys.readouterr().err
