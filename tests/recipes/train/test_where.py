"""Runs in other precisions and with recomputed layers, on the CPU; what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from recipes import commands
from recipes.embedded.vocabulary import SYSTEM_PROMPT
from recipes.options.parse import changed
from recipes.options.use import ScoreOptions
from recipes.options.values import OptionError
from recipes.run.identity import differences, identity
from recipes.train.training import run_training


def losses(run):
    lines = (run / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["lower_loss"] for line in lines]


def tensors(run):
    return load_file(run / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def plain(task, tmp_path_factory):
    return run_training(task.train(tmp_path_factory.mktemp("plain") / "run", bound="clip"))


@pytest.mark.parametrize(
    ("precision", "saved"), [("bf16", torch.float32), ("bf16-pure", torch.bfloat16)]
)
def test_a_run_computes_in_bfloat16(task, tmp_path, plain, precision, saved):
    run = run_training(task.train(tmp_path / "run", bound="clip", precision=precision))
    assert {tensor.dtype for tensor in tensors(run).values()} == {saved}
    found, expected = losses(run), losses(plain)
    assert found != expected
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("layers", ["vision", "all"])
def test_a_run_that_recomputes_layers_has_the_same_bits(task, tmp_path, layers):
    whole = {"freeze": (), "weighting": "table", "bound": "clip"}
    plain = run_training(task.train(tmp_path / "plain", **whole))
    run = run_training(task.train(tmp_path / "run", **whole, activation_checkpointing=layers))
    expected, found = tensors(plain), tensors(run)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (run / "weights.jsonl").read_text() == (plain / "weights.jsonl").read_text()


def test_a_run_goes_on_in_the_precision_in_which_it_began(task, tmp_path):
    options = task.train(tmp_path / "run", save_every=2, steps=4)
    run = run_training(options)
    (run / "results.json").unlink()
    again = changed(options, resume=str(run))
    with pytest.raises(OptionError, match=r"--precision bf16 \(checkpoint: float32\)"):
        run_training(changed(again, precision="bf16"))
    run_training(changed(again, precision="float32", device="cpu"))  # what auto stands for


def test_checkpoints_without_the_newer_options_are_of_runs_that_had_none(task, tmp_path):
    options = task.train(tmp_path)
    names = ("precision", "lora_rank", "lora_alpha", "lora_targets", "too_long")
    now = identity(options, torch.nn.Linear(1, 1))["options"]
    then = {name: value for name, value in now.items() if name not in names}
    assert len(then) == len(now) - len(names)
    then = {"options": then, "files": {}, "model": "m"}
    for precision, found in (
        ("float32", []),
        ("bf16", ["--precision bf16 (checkpoint: float32)"]),
    ):
        assert differences(then, {**then, "options": {**now, "precision": precision}}) == found


def test_scores_go_on_in_the_precision_in_which_they_began(task, tmp_path, capsys):
    given = ScoreOptions(
        model=str(task.model),
        system_prompt=SYSTEM_PROMPT,
        file=str(task.data / "dev.jsonl"),
        output=str(tmp_path / "scores.jsonl"),
    )
    assert commands.run("score", given) == 0
    (file,) = [path for path in tmp_path.iterdir() if '"precision"' in path.read_text()]
    settings = json.loads(file.read_text())
    assert settings.pop("precision") == "float32"
    file.write_text(json.dumps(settings))  # as of a version that did not write it
    assert commands.run("score", changed(given, precision="float32")) == 0
    assert commands.run("score", changed(given, precision="bf16")) == 2
    assert "other settings (precision: 'float32')" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("device", "cuda", "--device cuda: expected a CUDA device that this build of torch"),
        ("device", "gpu", "--device gpu: expected auto, cpu, cuda, cuda:N or mps"),
        ("attention", "flash", "--attention flash: FlashAttention computes on CUDA devices only"),
    ],
)
def test_what_the_machine_cannot_do_is_refused_in_a_sentence(
    task, tmp_path, capsys, monkeypatch, option, value, text
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = task.train(tmp_path / "run", **{option: value})
    assert commands.run("train", options) == 2
    error = capsys.readouterr().err
    assert text in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_accelerate_launch_chooses_the_precision(task, tmp_path, monkeypatch):
    asked = run_training(task.train(tmp_path / "asked", bound="clip", precision="bf16"))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    options = task.train(tmp_path / "launched", bound="clip")
    launched = run_training(options)
    expected, found = tensors(asked), tensors(launched)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert identity(options, torch.nn.Linear(1, 1))["options"]["precision"] == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(OptionError, match="ACCELERATE_MIXED_PRECISION=fp16"):
        run_training(task.train(tmp_path / "refused", bound="clip"))
