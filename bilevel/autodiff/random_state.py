"""One random state for all passes of a step.

Dropout, drop-path and any other random numbers in a loss must be the same in the lower forward
pass, in every pass that differentiates it again, and on both sides of a finite difference. Such a
pass runs with the generators restored to their state before the first pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel import tree
from bilevel.tree import Tree


@dataclass(frozen=True)
class RandomState:
    """The state of torch's default generators, on the CPU and on the parameters' devices."""

    cpu: Tensor
    devices: tuple[tuple[torch.device, Tensor], ...] = ()


def capture(params: Tree) -> RandomState:
    """Return the current state of the generators of the CPU and of the parameters' devices."""
    devices = {leaf.device for leaf in tree.leaves(params)} - {torch.device("cpu")}
    return RandomState(
        cpu=torch.get_rng_state(),
        devices=tuple(
            (device, torch.get_device_module(device).get_rng_state(device))
            for device in sorted(devices, key=str)
            if device.type != "meta"
        ),
    )


def restore(state: RandomState) -> None:
    """Set the generators to ``state``."""
    torch.set_rng_state(state.cpu)
    for device, generator_state in state.devices:
        torch.get_device_module(device).set_rng_state(generator_state, device)


@contextmanager
def rewound_to(state: RandomState, params: Tree) -> Iterator[None]:
    """Run the body from ``state``, and restore the generators' previous state afterwards."""
    before = capture(params)
    restore(state)
    try:
        yield
    finally:
        restore(before)
