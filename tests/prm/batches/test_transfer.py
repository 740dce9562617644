"""Batches on the way to another device; "meta" stands for one."""

from __future__ import annotations

import torch

from prm.batches.transfer import moved

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


class Copied:
    """Stands in for a tensor, and notes how it gets to a device that this machine lacks."""

    def __init__(self, noted: list, is_cpu: bool = True) -> None:
        self.noted, self.is_cpu = noted, is_cpu

    def pin_memory(self) -> Copied:
        self.noted.append("pinned")
        return self

    def to(self, device, non_blocking=False) -> Copied:
        self.noted.append((device, non_blocking))
        return Copied(self.noted, is_cpu=False)


def test_a_gpu_is_sent_pinned_memory_and_not_waited_for():
    noted: list = []
    device = torch.device("cuda", 1)
    (batch,) = moved([{"a": Copied(noted), "b": Copied(noted)}], device)
    assert noted == ["pinned", (device, True)] * 2
    again = moved(batch, device)  # what is there stays there
    assert noted == ["pinned", (device, True)] * 2
    assert again["a"] is batch["a"]
    moved({"a": Copied(noted)}, torch.device("mps", 0))  # has no pinned memory
    assert noted[4:] == [(torch.device("mps", 0), False)]
