"""Instance Net: a small network from features of an example's steps to its weight."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from weighting.base import Batch, Params
from weighting.bounds import Bound, Sigmoid
from weighting.normalise import batch_mean_one


@dataclass(frozen=True)
class InstanceNet:
    """``weight_i = bound(raw(prior) + mean_t MLP(x_it) [- batch mean])``.

    The MLP has ``layers`` hidden layers of ``hidden`` leaky-ReLU units and runs on the features of
    every step; its output is averaged over the steps of the example.

    Attributes:
        features: Number of features per step.
        hidden: Units per hidden layer.
        layers: Number of hidden layers.
        prior: Weight of every example at the start (the last layer starts at 0).
        bound: Map from raw weights to weights.
        centre: Subtract the batch mean of the network's output, so that the weights of a batch are
            spread around the prior and cannot all run to one bound.
        normalise: Divide the weights by their batch mean.

    Source: DreamPRM-1.5, arXiv 2509.05542, Instance Net (hidden 10, sigmoid, two probabilities as
    features); feature choice and centring are ours: two probabilities cannot show a wrong label.
    """

    reads: ClassVar[tuple[str, ...]] = ("features", "feature_mask")
    row_key: ClassVar[Literal["index", "domain"] | None] = None
    size: ClassVar[int] = 0  # no row belongs to any example

    features: int
    hidden: int = 10
    layers: int = 1
    prior: float = 1.0
    bound: Bound = Sigmoid(2.0)
    centre: bool = True
    normalise: bool = True

    def __post_init__(self) -> None:
        """Refuse sizes below 1 and a prior outside the bound."""
        for name in ("features", "hidden", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"InstanceNet needs {name} >= 1; found {getattr(self, name)}")
        self.bound.raw(self.prior)

    @property
    def start(self) -> float:
        """The prior weight."""
        return self.prior

    def init(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Hidden layers uniform in ±1/sqrt(fan in), the last layer 0: all weights at the prior.

        Args:
            generator: Draws the hidden layers; None: torch's global generator.

        Returns:
            ``hidden.<layer>.weight`` [hidden, fan in] and ``hidden.<layer>.bias`` [hidden] of
            every hidden layer, ``out.weight`` [1, hidden].
        """
        params: dict[str, Tensor] = {}
        fan_in = self.features
        for layer in range(self.layers):
            scale = 1 / math.sqrt(fan_in)
            for name, shape in (("weight", (self.hidden, fan_in)), ("bias", (self.hidden,))):
                uniform = torch.rand(shape, generator=generator)
                params[f"hidden.{layer}.{name}"] = (2 * uniform - 1) * scale
            fan_in = self.hidden
        params["out.weight"] = torch.zeros(1, fan_in)
        return params

    def raw_weights(
        self,
        params: Params,
        features: Float[Tensor, "batch steps features"],
        mask: Bool[Tensor, "batch steps"],
    ) -> Float[Tensor, " batch"]:
        """Raw weights, not centred: what the network says of each example on its own.

        Args:
            params: Parameters of the network.
            features: Features of every step.
            mask: Steps that are averaged over.

        Raises:
            ValueError: Another number of features than the network was built for.
        """
        if features.shape[-1] != self.features:
            raise ValueError(
                f"InstanceNet was built for {self.features} features per step; "
                f"found {features.shape[-1]}"
            )
        x = features
        for layer in range(self.layers):
            x = torch.nn.functional.leaky_relu(
                torch.nn.functional.linear(
                    x, params[f"hidden.{layer}.weight"], params[f"hidden.{layer}.bias"]
                )
            )
        per_step = torch.nn.functional.linear(x, params["out.weight"]).squeeze(-1)
        count = mask.sum(-1).clamp(min=1)
        return self.bound.raw(self.prior) + torch.where(mask, per_step, 0.0).sum(-1) / count

    def weights(
        self,
        params: Params,
        features: Float[Tensor, "batch steps features"],
        mask: Bool[Tensor, "batch steps"],
    ) -> Float[Tensor, " batch"]:
        """Weights, centred and normalised over the batch as configured.

        Raises:
            ValueError: Either of them for a batch of one, whose weight would never change.
        """
        raw = self.raw_weights(params, features, mask)
        if self.centre and len(raw) < 2:
            raise ValueError(
                "InstanceNet: centre needs at least two examples per micro-batch (a single "
                "example would always get the prior weight); use a larger batch or centre=False"
            )
        weights = self.bound(self._centred(raw))
        return batch_mean_one(weights) if self.normalise else weights

    def _centred(self, raw: Tensor) -> Tensor:
        return raw - raw.mean() + self.bound.raw(self.prior) if self.centre else raw

    def batch_weights(self, params: Params, batch: Batch) -> Float[Tensor, " batch"]:
        """``weights`` of ``batch["features"]``, averaged over ``batch["feature_mask"]``."""
        return self.weights(params, batch["features"], batch["feature_mask"])

    def file_weights(
        self, params: Params, batches: Iterable[Batch]
    ) -> tuple[Float[Tensor, " examples"], Float[Tensor, " examples"]]:
        """Weights and raw weights, as in training but centred and normalised over the whole file.

        What a weight says is how an example compares with the others of its file.
        """
        raw = torch.cat(
            [self.raw_weights(params, b["features"], b["feature_mask"]) for b in batches]
        )
        weights = self.bound(self._centred(raw))
        return (weights / weights.mean() if self.normalise else weights), raw

    def project(self, params: Params) -> Params:
        """``params``: what a net computes is not projected."""
        return params

    def share_at_bound(
        self, params: Params, weights: Float[Tensor, " batch"], tolerance: float = 0.01
    ) -> float:
        """Share of the ``weights`` of a batch that are at an end of the bound.

        If they were normalised, what is known of them is their ratio to the largest, which counts
        as at the upper end if some other is at the lower one (a net is centred: its weights cannot
        all be at one end). 0 for a bound with an infinite range.
        """
        low, high = self.bound.range
        if math.isinf(high - low):
            return 0.0
        if self.normalise:
            largest = float(weights.max())
            if high <= 0 or largest <= 0:
                return 0.0
            low, high, weights = low / high, 1.0, weights / largest
        margin = tolerance * (high - low)
        at_low, at_high = weights <= low + margin, weights >= high - margin
        if self.normalise and not bool(at_low.any()):
            return 0.0
        return float((at_low | at_high).float().mean())
