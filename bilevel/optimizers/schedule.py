"""Learning-rate schedules: functions of the number of earlier steps.

A schedule maps the step count (0 at the first step) to that step's learning rate. It may be any
such callable; those in this module are frozen dataclasses, which compare, pickle and print.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from bilevel.checks import require

Schedule: TypeAlias = Callable[[int | Tensor], float | Tensor]


@dataclass(frozen=True)
class Constant:
    """The same learning rate at every step.

    Raises:
        ValueError: ``lr`` is negative or not finite.
    """

    lr: float

    def __post_init__(self) -> None:
        require(self, "lr", self.lr)

    def __call__(self, count: int | Tensor) -> float:
        """Return the learning rate of step ``count``."""
        return self.lr


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up from 0 to ``peak``, then half a cosine down to ``floor``.

    With w = warmup_steps, T = total_steps and step count k::

        lr(k) = peak · k / w                                              for k < w
        lr(k) = floor + (peak − floor) · ½(1 + cos(π (k − w) / (T − w)))  for w ≤ k ≤ T
        lr(k) = floor                                                     for k > T

    With ``floor=0`` it equals ``transformers.get_cosine_schedule_with_warmup`` up to step T. After
    T that schedule increases again, while this one is constant. With a warm-up, the first step's
    rate is 0. An int gives a float; a tensor of counts gives a float64 tensor of the same shape.

    Raises:
        ValueError: ``peak`` is negative, ``total_steps`` below 1, ``warmup_steps`` outside
            [0, total_steps] or ``floor`` outside [0, peak].
    """

    peak: float
    warmup_steps: int
    total_steps: int
    floor: float = 0.0

    def __post_init__(self) -> None:
        require(self, "peak", self.peak)
        require(self, "total_steps", self.total_steps, low=1)
        require(self, "warmup_steps", self.warmup_steps, high=self.total_steps, high_open=False)
        require(self, "floor", self.floor, high=self.peak, high_open=False)

    def __call__(self, count: int | Tensor) -> float | Tensor:
        """Return the learning rate of step ``count`` (0 is the first step)."""
        cooldown_steps = max(1, self.total_steps - self.warmup_steps)
        if isinstance(count, Tensor):
            return self._of_tensor(count.to(torch.float64), cooldown_steps)
        if count < self.warmup_steps:
            return self.peak * (count / self.warmup_steps)
        progress = min(1.0, (count - self.warmup_steps) / cooldown_steps)
        height = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.floor + (self.peak - self.floor) * height

    def _of_tensor(self, count: Tensor, cooldown_steps: int) -> Tensor:
        progress = ((count - self.warmup_steps) / cooldown_steps).clamp(0.0, 1.0)
        height = 0.5 * (1.0 + torch.cos(math.pi * progress))
        rising = self.peak * (count / max(1, self.warmup_steps))
        falling = self.floor + (self.peak - self.floor) * height
        return torch.where(count < self.warmup_steps, rising, falling)


@dataclass(frozen=True)
class StepDecay:
    """``lr(k) = peak · factor^⌊k / every⌋``, as in ``torch.optim.lr_scheduler.StepLR``.

    Raises:
        ValueError: ``peak`` is negative, ``every`` below 1 or ``factor`` outside (0, 1].
    """

    peak: float
    every: int
    factor: float

    def __post_init__(self) -> None:
        require(self, "peak", self.peak)
        require(self, "every", self.every, low=1)
        require(self, "factor", self.factor, low_open=True, high=1.0, high_open=False)

    def __call__(self, count: int | Tensor) -> float | Tensor:
        """Return the learning rate of step ``count``; a tensor of counts gives float64."""
        if isinstance(count, Tensor):
            count = count.to(torch.float64)
            return self.peak * self.factor ** torch.floor(count / self.every)
        return float(self.peak * self.factor ** (count // self.every))
