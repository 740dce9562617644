"""LoRA: what is trained, and that saved models give the same scores in plain transformers."""

from __future__ import annotations

import builtins
import json
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from prm.losses import step_cross_entropy
from prm.models.adapters import adapter_parameters, add_lora, merged, save_adapter
from prm.models.model import load_prm, save_prm, step_logits
from tests.prm.tiny import (
    SYSTEM,
    example,
    in_float64,
    internvl,
    qwen,
    qwen2_5_vl,
    qwen2_tokenizer,
    save_image,
)

NEEDS_PEFT = pytest.mark.skipif(find_spec("peft") is None, reason="LoRA needs the extra 'peft'")


@pytest.fixture
def rows(tmp_path):
    wide = save_image(tmp_path / "wide.png", 100, 60, seed=1)
    return [example("a", 3, (wide,)), example("b", 2), example("c", 4, (wide, wide))]


def moved(params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: value + 0.1 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in params.items()
    }


@pytest.fixture
def without_peft(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "peft":
            raise ModuleNotFoundError("No module named 'peft'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)


def test_without_peft_the_message_says_what_to_install(without_peft):
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'bilevel-prm\[peft\]'"):
        add_lora(qwen().model)


def test_a_model_without_adapters_merges_to_itself():
    model = qwen().model
    state = model.state_dict()
    assert merged(model, state).keys() == state.keys()
    assert adapter_parameters(model) == {}
    with pytest.raises(ValueError, match="use add_lora first"):
        save_adapter(model, {}, "nowhere")
    with pytest.raises(ValueError, match="rank of 1 or more, found 0"):
        add_lora(model, rank=0)


@NEEDS_PEFT
def test_only_adapters_are_trained_and_they_start_at_nothing(rows):
    prm = internvl()
    collator = prm.collator(system_prompt=SYSTEM)
    before = step_logits(prm, {}, collator(rows))
    names = set(dict(prm.model.named_parameters()))
    params = add_lora(prm.model, rank=3, freeze=["vision_tower", "multi_modal_projector"])
    assert set(params) == set(adapter_parameters(prm.model))
    layers = [f"model.language_model.layers.{place}" for place in (0, 1)]
    linear = [
        *(f"self_attn.{side}_proj" for side in "qkvo"),
        *(f"mlp.{side}_proj" for side in ("gate", "up", "down")),
    ]
    assert set(params) == {
        f"{layer}.{name}.lora_{side}.default.weight"
        for layer in layers
        for name in linear
        for side in "AB"
    }
    assert names == {
        name.replace(".base_layer.", ".") for name, _ in prm.model.named_parameters()
    } - set(params)
    assert not any(parameter.requires_grad for parameter in prm.model.parameters())
    torch.testing.assert_close(step_logits(prm, params, collator(rows)), before, rtol=0, atol=1e-12)


@NEEDS_PEFT
def test_an_adapter_is_a_low_rank_change_of_the_weight(rows, monkeypatch):
    """W x + (α / r) B A x, by a model whose weights are W + (α / r) B A."""
    prm, plain = (in_float64(qwen2_5_vl(), monkeypatch) for _ in range(2))
    params = moved(add_lora(prm.model, rank=2, alpha=5.0, targets=["q_proj", "down_proj", "qkv"]))
    weights = dict(plain.model.named_parameters())
    changed = set()
    for name, down in params.items():
        if ".lora_A." in name:
            up = params[name.replace(".lora_A.", ".lora_B.")]
            target = name.replace(".lora_A.default", "")
            weights[target].data += 5.0 / 2 * up @ down
            changed.add(target.split(".")[-2])
    assert changed == {"q_proj", "down_proj", "qkv"}
    collator = plain.collator(system_prompt=SYSTEM)
    logits = step_logits(prm, params, collator(rows))
    expected = step_logits(plain, {}, collator(rows))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


@NEEDS_PEFT
def test_gradients_reach_the_adapters_and_nothing_else(rows):
    prm = internvl()
    params = {n: v.requires_grad_() for n, v in moved(add_lora(prm.model, rank=2)).items()}
    batch = prm.collator(system_prompt=SYSTEM)(rows)
    losses = step_cross_entropy(
        step_logits(prm, params, batch), batch["labels"], batch["step_mask"]
    )
    found = torch.autograd.grad(losses.sum(), params.values())
    assert all(grad.abs().sum() > 0 for grad in found)
    assert all(parameter.grad is None for parameter in prm.model.parameters())


@NEEDS_PEFT
@pytest.mark.parametrize("make", [internvl, qwen])
def test_saved_merged_and_loaded_in_plain_transformers(rows, tmp_path, make, monkeypatch):
    prm = in_float64(make() if make is internvl else make(qwen2_tokenizer()), monkeypatch)
    items = [row for row in rows if make is internvl or not row.images]
    names = {name for name, _ in prm.model.named_parameters()}
    params = moved(add_lora(prm.model, rank=2))
    batch = prm.collator(system_prompt=SYSTEM)(items)
    expected = step_logits(prm, params, batch)
    save_prm(prm, params, tmp_path / "model")
    loaded = in_float64(load_prm(tmp_path / "model", dtype=torch.float64), monkeypatch)
    assert {name for name, _ in loaded.model.named_parameters()} == names
    torch.testing.assert_close(step_logits(loaded, {}, batch), expected, rtol=0, atol=1e-10)


@NEEDS_PEFT
# peft 0.21 asks transformers 5.23 for a name that has changed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_alone_are_loaded_by_peft(rows, tmp_path):
    prm, base = internvl(), internvl()
    params = moved(add_lora(prm.model, rank=2, alpha=3.0, freeze=["vision_tower"]))
    save_adapter(prm.model, params, tmp_path / "adapter", base="some/base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (
        "some/base", 2, 3.0,
    )  # fmt: skip
    batch = base.collator(system_prompt=SYSTEM)(rows)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    loaded = (
        import_module("peft").PeftModel.from_pretrained(base.model, tmp_path / "adapter").eval()
    )
    logits = loaded(**inputs).logits[torch.arange(3)[:, None], batch["label_positions"]]
    found = logits[..., [base.plus_id, base.minus_id]]
    torch.testing.assert_close(found, step_logits(prm, params, batch), rtol=0, atol=1e-10)
    with pytest.raises(FileExistsError, match=r"adapter_model\.safetensors exists"):
        save_adapter(prm.model, params, tmp_path / "adapter")


@NEEDS_PEFT
def test_adapters_of_a_model_in_16_bits_are_in_float32():
    prm = qwen(dtype=torch.bfloat16)
    params = add_lora(prm.model, rank=2)
    assert {value.dtype for value in params.values()} == {torch.float32}
    batch = prm.collator(system_prompt=SYSTEM)([example("b", 2)])
    assert step_logits(prm, params, batch).isfinite().all()


@NEEDS_PEFT
def test_names_of_nothing_and_second_adapters_are_refused():
    prm = internvl()
    with pytest.raises(ValueError, match=r"found 'nose_proj'; there are .*q_proj"):
        add_lora(prm.model, targets=["q_proj", "nose_proj"])
    with pytest.raises(ValueError, match="there are none"):
        add_lora(prm.model, freeze=["model"])
    assert adapter_parameters(prm.model) == {}
    add_lora(prm.model, targets=["q_proj"])
    with pytest.raises(ValueError, match="without adapters, found one that has some"):
        add_lora(prm.model)
