"""Batches on the way from the host to the device that computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Batches = TypeVar("Batches")


def moved(batches: Batches, device: torch.device) -> Batches:
    """Return a batch, or a list of batches, with its tensors on ``device``.

    To a CUDA device they are copied from pinned memory, and the host does not wait. On the CPU the
    batch is returned as it is.
    """
    if device.type == "cpu":
        return batches
    if isinstance(batches, Mapping):
        return cast(Batches, _moved(batches, device))
    assert isinstance(batches, Sequence)
    several: Any = [_moved(batch, device) for batch in batches]
    return cast(Batches, several)


def _moved(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    if device.type == "cuda":
        return {
            name: value.pin_memory().to(device, non_blocking=True) if value.is_cpu else value
            for name, value in batch.items()
        }
    return {name: value.to(device) for name, value in batch.items()}
