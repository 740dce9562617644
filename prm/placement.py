"""Where and how a model computes: device, precision, attention, what is stored of a pass.

One ``Placement`` stands for the four. ``load`` puts the model there; the parameters of the
lower level are the model's, and optimizer states follow the parameters, so they are there, too. The
parameters of the upper level and the batches are moved by ``params`` and ``batches``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

from prm.batches.transfer import moved
from prm.models.activation_checkpointing import in_vision
from prm.models.model import PRM, load_prm
from prm.names import Attention, Precision, Recomputed

Batches = TypeVar("Batches")

_KERNELS = {"auto": None, "eager": "eager", "sdpa": "sdpa", "flash": "flash_attention_2"}


@dataclass(frozen=True)
class Placement:
    """Where and how a model computes.

    Attributes:
        device: The device of the parameters, states and batches of both levels.
        precision: "float32"; "bf16", where parameters and optimizers are float32 and the body of
            the model computes in bfloat16 (autocast); or "bf16-pure", where the parameters are
            bfloat16, too.
        attention: The kernel of the attention; "auto" is transformers' choice.
        activation_checkpointing: The layers that are recomputed in the backward pass.
    """

    device: torch.device = torch.device("cpu")
    precision: Precision = "float32"
    attention: Attention = "auto"
    activation_checkpointing: Recomputed = "none"

    def load(self, path_or_name: str | Path) -> PRM:
        """Load a model to where it computes; see ``prm.models.model.load_prm``."""
        prm = load_prm(
            path_or_name,
            dtype=torch.bfloat16 if self.precision == "bf16-pure" else torch.float32,
            attn_implementation=_KERNELS[self.attention],
            device=self.device,
        )
        return replace(
            prm,
            autocast=torch.bfloat16 if self.precision == "bf16" else None,
            activation_checkpointing=_LAYERS[self.activation_checkpointing],
        )

    def check_trained(self, trained: Mapping[str, Tensor], prm: PRM) -> None:
        """Refuse activation checkpointing of a part in which nothing is trained.

        Args:
            trained: The trained parameters by name.
            prm: The model.

        Raises:
            ValueError: The vision tower is frozen, or there is none.
        """
        if self.activation_checkpointing == "vision" and not in_vision(prm.model, trained):
            raise ValueError(
                "activation-checkpointing vision: has no effect, since no parameter of a vision "
                "tower is trained, so that nothing of it is stored; use all or none"
            )

    def params(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return parameters of the upper level where the model computes."""
        return {name: value.to(self.device) for name, value in params.items()}

    def batches(
        self, batches: Callable[[int], Batches], steps: int, every: int = 1
    ) -> Callable[[int], Batches]:
        """Return the same ``batches``, moved to the device.

        On a CUDA device they are pinned and copied without waiting, and those of the next request
        are prepared while the device computes. An error in preparing them is raised when they are
        requested.

        Args:
            batches: The batch or the list of micro-batches of a step, as a function of its number.
            steps: The number of steps of the whole run.
            every: The number of steps from one request to the next.
        """
        if self.device.type == "cpu":
            return batches
        ahead: dict[int, Batches] = {}

        def placed(step: int) -> Batches:
            found = ahead.pop(step) if step in ahead else moved(batches(step), self.device)
            ahead.clear()
            if self.device.type == "cuda" and (coming := step + every) < steps:
                with suppress(OSError, ValueError, RuntimeError):
                    ahead[coming] = moved(batches(coming), self.device)
            return found

        return placed


_LAYERS: Mapping[Recomputed, bool | Literal["vision"]] = {
    "none": False,
    "vision": "vision",
    "all": True,
}


def resolve(
    device: str = "auto",
    precision: Literal["auto", Precision] = "auto",
    attention: Attention = "auto",
    activation_checkpointing: Recomputed = "none",
) -> Placement:
    """Return the placement with these settings on this machine.

    Args:
        device: "cpu", "cuda" (the first), "cuda:N", "mps", or "auto": "cuda" if there is one, else
            "cpu".
        precision: That of ``Placement``, or "auto": "bf16" on a CUDA device that has bfloat16, else
            "float32".
        attention: That of ``Placement``.
        activation_checkpointing: That of ``Placement``.

    Raises:
        ValueError: The device is not there, or cannot compute in this precision or attention. The
            message begins with the name of the argument.
    """
    found = _device(device)
    half = found.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        precision = "bf16" if half else "float32"
    elif precision != "float32" and found.type == "cuda" and not half:
        raise ValueError(f"precision {precision}: {found} has no bfloat16; use float32")
    if attention == "flash":
        _check_flash(found, precision)
    return Placement(found, precision, attention, activation_checkpointing)


def _device(name: str) -> torch.device:
    """Return the device of a name, with its number if it is one of several."""
    parts = re.fullmatch(r"auto|cpu|mps|cuda(?::(\d{1,3}))?", name)
    if parts is None:
        raise ValueError(f"device {name}: expected auto, cpu, cuda, cuda:N or mps")
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not cuda):
        return torch.device("cpu")
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError("device mps: this machine or this build of torch has none; use cpu")
        return torch.device("mps", 0)
    number = int(parts[1] or 0)
    if number >= cuda:
        known = f"{cuda}, numbered from 0" if cuda else "none"
        raise ValueError(
            f"device {name}: expected a CUDA device that this build of torch can use, found "
            f"{known}; use {'cuda:0' if cuda else 'cpu'}"
        )
    return torch.device("cuda", number)


def _check_flash(device: torch.device, precision: Precision) -> None:
    from transformers.utils import is_flash_attn_2_available

    if device.type != "cuda":
        raise ValueError(
            f"attention flash: FlashAttention computes on CUDA devices only, found {device}; use "
            "sdpa"
        )
    if precision == "float32":
        raise ValueError(
            "attention flash: FlashAttention computes in 16 bits only, found precision float32; "
            "use sdpa, or precision bf16"
        )
    if not is_flash_attn_2_available():
        raise ValueError(
            "attention flash: the package flash-attn is not installed; use sdpa, by which torch "
            "has a kernel of this kind, too"
        )
