"""Instance Net: a small network from features of an example's steps to its weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from weighting.bounds import Bound, Sigmoid
from weighting.normalise import batch_mean_one

Params = dict[str, Tensor]


@dataclass(frozen=True)
class InstanceNet:
    """``weight_i = bound(raw(prior) + mean_t MLP(x_it) [- batch mean])``.

    The MLP has ``layers`` hidden layers of ``hidden`` leaky-ReLU units and runs on the features of
    every step; its output is averaged over the steps of the example.

    Attributes:
        features: number of features per step.
        hidden: units per hidden layer.
        layers: number of hidden layers.
        prior: weight of every example at the start (the last layer starts at 0).
        bound: map from raw weights to weights.
        centre: subtract the batch mean of the network's output, so that the weights of a batch are
            spread around the prior and cannot all run to one bound.
        normalise: divide the weights by their batch mean.

    Source: DreamPRM-1.5, arXiv 2509.05542, Instance Net (hidden 10, sigmoid, two probabilities as
    features); feature choice and centring are ours: two probabilities cannot show a wrong label.
    """

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

    def init(self, generator: torch.Generator | None = None) -> Params:
        """Hidden layers uniform in ±1/sqrt(fan in), the last layer 0: all weights at the prior."""
        params: Params = {}
        fan_in = self.features
        for layer in range(self.layers):
            scale = 1 / math.sqrt(fan_in)
            for name, shape in (("weight", (self.hidden, fan_in)), ("bias", (self.hidden,))):
                uniform = torch.rand(shape, generator=generator)
                params[f"hidden.{layer}.{name}"] = (2 * uniform - 1) * scale
            fan_in = self.hidden
        params["out.weight"] = torch.zeros(1, fan_in)
        return params

    def raw_weights(self, params: Params, features: Tensor, mask: Tensor) -> Tensor:
        """Raw weights [batch] from ``features`` [batch, steps, features], ``mask`` [batch, steps].

        Not centred: what the network says of each example on its own.
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

    def weights(self, params: Params, features: Tensor, mask: Tensor) -> Tensor:
        """Weights [batch], centred and normalised over the batch as configured.

        Raises:
            ValueError: either of them for a batch of one, whose weight would never change.
        """
        raw = self.raw_weights(params, features, mask)
        if self.centre:
            if len(raw) < 2:
                raise ValueError(
                    "InstanceNet: centre needs at least two examples per micro-batch (a single "
                    "example would always get the prior weight); use a larger batch or centre=False"
                )
            raw = raw - raw.mean() + self.bound.raw(self.prior)
        weights = self.bound(raw)
        return batch_mean_one(weights) if self.normalise else weights
