"""Batches on the way to another device; "meta" stands for one."""

from __future__ import annotations

import torch

from prm.inputs.transfer import moved

META = torch.device("meta")


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
