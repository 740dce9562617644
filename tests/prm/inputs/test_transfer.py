"""Batches on the way to another device; "meta" stands for one."""

from __future__ import annotations

import pytest
import torch

from prm.inputs.transfer import moved
from prm.models.model import step_logits
from tests.prm.tiny import example, internvl, llama, qwen, qwen2_5_vl, qwen2_vl, save_image

META = torch.device("meta")
FAMILIES = {
    "internvl": internvl,
    "qwen2-vl": qwen2_vl,
    "qwen2.5-vl": qwen2_5_vl,
    "qwen2": qwen,
    "llama": llama,
}


def test_on_the_cpu_a_batch_is_itself():
    batch = {"attention_mask": torch.ones(2, 3), "labels": torch.zeros(2, 1)}
    assert moved(batch, torch.device("cpu")) is batch
    assert moved([batch], torch.device("cpu"))[0] is batch


def test_every_tensor_is_moved():
    batch = {"attention_mask": torch.tensor([[1, 1], [1, 0]]), "labels": torch.zeros(2, 1)}
    one, (first, second) = moved(batch, META), moved([batch, batch], META)
    for found in (one, first, second):
        assert {name: value.device for name, value in found.items()} == dict.fromkeys(batch, META)
    assert batch["labels"].is_cpu


def test_a_mask_of_ones_is_left_out():
    batch = {"attention_mask": torch.ones(2, 3, dtype=torch.long), "labels": torch.zeros(2, 1)}
    assert moved(batch, META).keys() == {"labels"}
    assert batch.keys() == {"attention_mask", "labels"}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_a_mask_computes_the_same_bits(tmp_path, family, attention):
    prm = FAMILIES[family]()
    prm.model.set_attn_implementation(attention)
    image = save_image(tmp_path / "a.png", 100, 60, seed=1)
    pictures = () if prm.image_tokens is None else (image,)
    collator = prm.collator()
    batch = collator([collator.encode(example(n, 3, pictures)) for n in "ab"])
    assert bool(batch["attention_mask"].all())
    without = {name: value for name, value in batch.items() if name != "attention_mask"}
    results = []
    for inputs in (batch, without):
        leaves = {n: p.detach().requires_grad_() for n, p in prm.model.named_parameters()}
        logits = step_logits(prm, leaves, inputs)
        grads = torch.autograd.grad(logits.sum(), leaves.values(), allow_unused=True)
        results.append([logits, *(g for g in grads if g is not None)])
    assert len(results[0]) > 10
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
