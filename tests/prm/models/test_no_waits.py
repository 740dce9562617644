"""Padding and image tokens on a device: not looked at, and on the CPU as transformers does."""

from __future__ import annotations

import pytest
import torch

from prm.inputs.image_inputs import row_owners
from prm.models import model as prm_model
from prm.models.model import step_logits
from prm.models.no_waits import attention_mask
from tests.prm.tiny import (
    SYSTEM,
    example,
    in_float64,
    internvl,
    llama,
    qwen,
    save_image,
    word_tokenizer,
)


@pytest.fixture
def padded(tmp_path):
    wide = save_image(tmp_path / "wide.png", 100, 60, seed=1)
    tall = save_image(tmp_path / "tall.png", 50, 200, seed=2)
    return [example("a", 3, [wide]), example("b", 2, []), example("c", 5, [wide, tall])]


@pytest.mark.parametrize("make", [internvl, qwen])
def test_padding_on_the_right_does_not_change_what_a_causal_model_says(padded, make, monkeypatch):
    prm = in_float64(make(word_tokenizer()), monkeypatch)
    rows = padded if make is internvl else [example("a", 3, []), example("b", 1, [])]
    batch = prm.collator(system_prompt=SYSTEM)(rows)
    assert not batch["attention_mask"].all()
    expected = step_logits(prm, {}, batch)
    seen = []

    def none(model, mask):
        seen.append(attention_mask(model, mask.to("meta")))
        return seen[-1]

    monkeypatch.setattr(prm_model, "attention_mask", none)
    found = step_logits(prm, {}, batch)
    assert seen == [{"full_attention": None}]
    counted = batch["step_mask"]
    torch.testing.assert_close(found[counted], expected[counted], rtol=0, atol=1e-12)


def test_a_mask_stays_on_the_cpu_and_where_attention_needs_one():
    here, there = torch.ones(2, 3), torch.ones(2, 3, device="meta")
    model = qwen(word_tokenizer()).model
    assert attention_mask(model, here) is here
    assert attention_mask(model, there) == {"full_attention": None}
    model.set_attn_implementation("eager")
    assert attention_mask(model, there) is there
    model.set_attn_implementation("sdpa")
    model.config.layer_types = ["full_attention", "sliding_attention"]
    assert attention_mask(model, there) is there
    assert attention_mask(llama(word_tokenizer()).model, there) is there


def test_image_tokens_are_counted_on_the_cpu(padded):
    prm = internvl(word_tokenizer())
    batch = prm.collator(system_prompt=SYSTEM)(padded)
    batch["pixel_values"] = batch["pixel_values"][1:]
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        step_logits(prm, {}, batch)


def test_the_owners_of_tiles_are_not_counted_where_each_has_a_row():
    tiles = torch.tensor([2, 0, 3])
    pixels = torch.zeros(5, 3, 4, 4)
    (owner,) = row_owners({"num_patches": tiles, "pixel_values": pixels}).values()
    assert owner.tolist() == [0, 0, 2, 2, 2]
    with pytest.raises(RuntimeError, match="size"):
        row_owners({"num_patches": tiles, "pixel_values": pixels[:4]})
