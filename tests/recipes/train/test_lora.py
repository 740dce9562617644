"""Adapters from the commands: what is trained, what is written, what is refused."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from prm.models.model import load_prm
from recipes.options.flat import flat_options
from recipes.options.parse import changed
from recipes.options.train import TrainOptions
from recipes.options.values import OptionError
from recipes.train.cold_start import run_cold_start
from recipes.train.training import run_training

pytestmark = pytest.mark.skipif(find_spec("peft") is None, reason="LoRA needs the extra 'peft'")


def weights(folder):
    return dict(load_prm(folder).model.named_parameters())


def test_a_run_trains_adapters_alone_and_writes_them_apart_and_merged(task, tmp_path):
    run = run_training(
        task.train(tmp_path / "run", lora_rank=2, lora_alpha=3.0, lora_targets=("q_proj", "v_proj"))
    )
    before, after = weights(task.model), weights(run / "model")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in moved} == {"q_proj", "v_proj"}
    assert all("language_model" in name and name.endswith(".weight") for name in moved)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 3.0)
    assert config["base_model_name_or_path"] == str(task.model)
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    for name in moved:
        place = f"base_model.model.{name.removesuffix('.weight')}"
        down, up = (adapter[f"{place}.lora_{side}.weight"] for side in "AB")
        assert down.shape[0] == up.shape[1] == 2
        expected = before[name] + 3.0 / 2 * (up @ down)
        torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("save", get_args(flat_options(TrainOptions)["lora_save"].hint))
def test_what_is_written_is_what_is_asked_for(task, tmp_path, save):
    run = run_cold_start(task.cold_start(tmp_path / "run", steps=1, lora_rank=1, lora_save=save))
    written = {path.name for path in run.iterdir()} & {"model", "adapter"}
    assert written == {"adapter": {"adapter"}, "merged": {"model"}}.get(save, {"adapter", "model"})


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_peft_loads_the_adapter_beside_the_first_model(task, tmp_path):
    import peft

    run = run_cold_start(task.cold_start(tmp_path / "run", steps=2, lora_rank=2))
    base = load_prm(task.model)
    merged = load_prm(run / "model")
    wrapped = peft.PeftModel.from_pretrained(base.model, run / "adapter")
    ids = torch.arange(7)[None]
    with torch.no_grad():
        expected = merged.model(input_ids=ids).logits
        found = wrapped(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_run_with_adapters_resumes_bit_for_bit(task, tmp_path, monkeypatch):
    options = task.train(tmp_path / "whole", lora_rank=2, save_every=2, keep_checkpoints=0)
    whole = run_training(options)
    shutil.copytree(whole, tmp_path / "cut")
    for name in ("results.json", "checkpoints/step-4"):
        path = tmp_path / "cut" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    cut = run_training(
        changed(options, output_dir=str(tmp_path / "cut"), resume=str(tmp_path / "cut"))
    )
    file = "adapter/adapter_model.safetensors"
    assert (cut / file).read_bytes() == (whole / file).read_bytes()
    monkeypatch.setattr(
        "recipes.train.training.load_trained", None
    )  # it is told before anything is loaded
    with pytest.raises(OptionError, match=r"--resume .*: the run is complete"):
        run_training(changed(options, output_dir=str(cut), resume=str(cut)))


def test_layers_that_are_frozen_or_not_there_are_refused(task, tmp_path):
    with pytest.raises(OptionError, match=r"--lora-targets: expected names of linear .*'nothing'"):
        run_training(task.train(tmp_path / "a", lora_rank=2, lora_targets=("nothing",)))
    with pytest.raises(OptionError, match=r"--activation-checkpointing vision: has no effect"):
        run_training(
            task.train(
                *(tmp_path / "b",),
                **{"freeze": ("multi_modal_projector",), "lora_targets": ("down_proj",)},
                **{"lora_rank": 2, "activation_checkpointing": "vision"},
            )
        )
    assert not (tmp_path / "a").exists()


def test_options_of_adapters_without_any_are_refused(task, tmp_path):
    with pytest.raises(OptionError, match=r"--lora-alpha 3.0 has no effect with --lora-rank 0"):
        task.train(tmp_path, lora_alpha=3.0)
