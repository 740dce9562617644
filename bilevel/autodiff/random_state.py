"""One random state for all passes of a step.

Dropout, drop-path or any other draw in a loss must be the same in the lower forward pass, in
every pass that differentiates it again, and on both sides of a finite difference. Such a pass runs
with the generators rewound to the state from which the first was run.
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
    """torch's default generators, on the CPU and on the devices that matter."""

    cpu: Tensor
    devices: tuple[tuple[torch.device, Tensor], ...] = ()


def capture(params: Tree) -> RandomState:
    """Return the present state of the CPU's generator and those of the parameters' devices."""
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
    """Continue from ``state``."""
    torch.set_rng_state(state.cpu)
    for device, generator_state in state.devices:
        torch.get_device_module(device).set_rng_state(generator_state, device)


@contextmanager
def rewound_to(state: RandomState, params: Tree) -> Iterator[None]:
    """Run the body from ``state``; afterwards the generators are where they were before."""
    before = capture(params)
    restore(state)
    try:
        yield
    finally:
        restore(before)
