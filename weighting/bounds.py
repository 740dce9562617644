"""Bounds: elementwise maps from raw weights (any real number) to weights in a stated range.

Each bound documents its range and what the gradient does at the edge, because that decides whether
an instance that was pushed to the edge can ever come back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Bound(Protocol):
    """An elementwise map from raw weights to weights; a frozen dataclass of its configuration."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def range(self) -> tuple[float, float]:
        """Infimum and supremum of the weights."""

    def __call__(self, raw_weights: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Weights, of the shape of ``raw_weights``."""

    def raw(self, weight: float) -> float:
        """The raw weight whose weight is ``weight``.

        Raises:
            ValueError: There is none.
        """


def _outside(bound: Bound, weight: float) -> ValueError:
    lo, hi = bound.range
    return ValueError(
        f"{bound} gives weights between {lo:g} and {hi:g}; found the prior weight {weight:g}. "
        "Choose a prior inside that range or another bound"
    )


class _StraightThroughClamp(torch.autograd.Function):
    # Context apart from the forward, and a rule for vmap and for jvp: what torch.func asks for.
    generate_vmap_rule = True

    @staticmethod
    def forward(raw_weights: Tensor, lo: float, hi: float) -> Tensor:
        return raw_weights.clamp(lo, hi)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, float], output: Tensor) -> None:
        del ctx, inputs, output  # nothing is needed

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[0], None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        raw: Tensor = tangents[0]  # the ends of the bound have none
        return raw.view_as(raw)


@dataclass(frozen=True)
class Clip:
    """``clamp(raw, lo, hi)``; range [lo, hi].

    Gradient 1 inside. Past an edge the exact derivative is 0, which would freeze an instance there
    for good (so it is in DreamPRM-1.5, whose bound is ``Clip(-1, 3, recover=False)``). With
    ``recover`` (default) it is taken as 1 there too, so that an instance can come back. That lets a
    raw weight travel on outward as well: move the raw weights back to the edge after every upper
    step, ``Projected(optimizer, table.project)`` of ``bilevel`` (projected gradient descent).
    (A derivative that is 1 only inward would have to know the sign of the whole hypergradient, and
    is handed parts of it, or none, by the second-order routes.)
    """

    lo: float = 0.0
    hi: float = 2.0
    recover: bool = True

    def __post_init__(self) -> None:
        """Refuse an empty interval."""
        if not (math.isfinite(self.lo) and math.isfinite(self.hi) and self.lo < self.hi):
            raise ValueError(f"Clip needs finite lo < hi; found lo={self.lo}, hi={self.hi}")

    @property
    def range(self) -> tuple[float, float]:
        """``(lo, hi)``."""
        return self.lo, self.hi

    def __call__(self, raw_weights: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Clamped raw weights."""
        if not self.recover:
            return raw_weights.clamp(self.lo, self.hi)
        clamp: Callable[[Tensor, float, float], Tensor] = _StraightThroughClamp.apply
        return clamp(raw_weights, self.lo, self.hi)

    def raw(self, weight: float) -> float:
        """``weight`` itself."""
        if not self.lo <= weight <= self.hi:
            raise _outside(self, weight)
        return weight


@dataclass(frozen=True)
class Sigmoid:
    """``scale * sigmoid(raw)``; range (0, scale).

    The gradient ``scale * s (1 - s)`` vanishes at both edges but never reaches 0: instances slow
    down there and can come back. With scale 2 a raw weight of 0 means weight 1.
    """

    scale: float = 2.0

    def __post_init__(self) -> None:
        """Refuse a scale that is not positive."""
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"Sigmoid needs a positive scale; found {self.scale}")

    @property
    def range(self) -> tuple[float, float]:
        """``(0, scale)``, neither reached."""
        return 0.0, self.scale

    def __call__(self, raw_weights: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Scaled logistic function of the raw weights."""
        return self.scale * torch.sigmoid(raw_weights)

    def raw(self, weight: float) -> float:
        """Logit of ``weight / scale``."""
        if not 0 < weight < self.scale:
            raise _outside(self, weight)
        return math.log(weight / (self.scale - weight))


@dataclass(frozen=True)
class Softplus:
    """``log(1 + exp(raw))``; range (0, inf). Gradient ``sigmoid(raw)``, vanishing towards 0."""

    @property
    def range(self) -> tuple[float, float]:
        """``(0, inf)``."""
        return 0.0, math.inf

    def __call__(self, raw_weights: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Softplus of the raw weights."""
        return torch.nn.functional.softplus(raw_weights)

    def raw(self, weight: float) -> float:
        """``log(exp(weight) - 1)``."""
        if not 0 < weight < math.inf:
            raise _outside(self, weight)
        return weight + math.log(-math.expm1(-weight))


@dataclass(frozen=True)
class LeakyReLU:
    """``max(raw, slope * raw)``; range (-inf, inf), or [0, inf) with slope 0 (ReLU).

    DreamPRM-1.5's default activation. With slope 0 an instance below 0 has gradient 0 and stays
    there; with a positive slope its weight turns (slightly) negative, which ascends its loss.
    """

    slope: float = 0.01

    def __post_init__(self) -> None:
        """Refuse a slope outside [0, 1)."""
        if not 0 <= self.slope < 1:
            raise ValueError(f"LeakyReLU needs a slope in [0, 1); found {self.slope}")

    @property
    def range(self) -> tuple[float, float]:
        """``(-inf, inf)``; ``(0, inf)`` with slope 0."""
        return (0.0 if self.slope == 0 else -math.inf), math.inf

    def __call__(self, raw_weights: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Leaky rectified raw weights."""
        return torch.nn.functional.leaky_relu(raw_weights, self.slope)

    def raw(self, weight: float) -> float:
        """``weight`` itself, or ``weight / slope`` below 0."""
        if weight < 0 and self.slope == 0:
            raise _outside(self, weight)
        return weight if weight >= 0 else weight / self.slope


@dataclass(frozen=True)
class Unbounded:
    """``raw`` itself; range (-inf, inf), gradient 1. Weights can run away; for ablations."""

    @property
    def range(self) -> tuple[float, float]:
        """``(-inf, inf)``."""
        return -math.inf, math.inf

    def __call__(self, raw_weights: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The raw weights."""
        return raw_weights

    def raw(self, weight: float) -> float:
        """``weight`` itself."""
        return weight


def effective_sample_size(weights: Float[Tensor, " examples"]) -> float:
    """``(Σ w)² / Σ w²`` (Kish): how many equally weighted examples the weights are worth.

    Between 1 and the number of examples for non-negative weights; 0 when all weights are 0.
    """
    total, squares = float(weights.sum()), float((weights * weights).sum())
    return 0.0 if squares == 0 else total * total / squares


def fraction_at_bound(
    raw_weights: Float[Tensor, "*shape"], bound: Bound, tolerance: float = 0.01
) -> float:
    """Share of weights within ``tolerance`` × width of an end of the bound's range.

    Args:
        raw_weights: Raw weights, of any shape.
        bound: Maps them to weights.
        tolerance: Share of the width of the bound's range.

    Returns:
        The share, in [0, 1]; 0 for a bound with an infinite range.
    """
    return float(mean_at_bound(raw_weights, bound, tolerance))


def mean_at_bound(
    raw_weights: Float[Tensor, "*shape"], bound: Bound, tolerance: float = 0.01
) -> Float[Tensor, ""]:
    """Return ``fraction_at_bound`` as a tensor, for which the host does not wait for a device."""
    lo, hi = bound.range
    if hi - lo == float("inf"):
        return torch.zeros(())
    margin = tolerance * (hi - lo)
    weights = bound(raw_weights.detach())
    return ((weights <= lo + margin) | (weights >= hi - margin)).float().mean()
