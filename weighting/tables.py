"""Tables: one learnable weight per instance (DreamPRM-1.5) or per domain (DreamPRM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from weighting.bounds import Bound, Clip, Softplus
from weighting.normalise import batch_mean_one, mean_one, mean_one_over

Params = dict[str, Tensor]


@dataclass(frozen=True)
class InstanceTable:
    """``weight_i = bound(raw(prior) + deviation_i)``, one row per instance.

    The parameter is the deviation from the prior, so that weight decay pulls a row back to the
    prior weight (that is 1, "as good as any"), not to weight 0.

    Attributes:
        size: number of instances.
        prior: weight of every instance at the start, and where decay pulls.
        bound: map from raw weights to weights.
        normalise: "batch" (mean 1 within the batch), "table" (mean 1 over all rows) or "none".

    Source: DreamPRM-1.5, arXiv 2509.05542, Instance Table.
    """

    size: int
    prior: float = 1.0
    bound: Bound = Clip(0.0, 2.0)
    normalise: Literal["batch", "table", "none"] = "batch"

    def __post_init__(self) -> None:
        """Refuse an empty table, a prior outside the bound, an unknown normalisation."""
        if self.size < 1:
            raise ValueError(f"InstanceTable needs size >= 1; found {self.size}")
        if self.normalise not in ("batch", "table", "none"):
            raise ValueError(
                f'InstanceTable: normalise must be "batch", "table" or "none"; '
                f"found {self.normalise!r}"
            )
        self.bound.raw(self.prior)

    def init(self) -> Params:
        """All weights at the prior: ``{"deviation": zeros [size]}``."""
        return {"deviation": torch.zeros(self.size)}

    def raw_weights(self, params: Params) -> Tensor:
        """Raw weights of every row, [size]."""
        return self.bound.raw(self.prior) + params["deviation"]

    def project(self, params: Params) -> Params:
        """The nearest parameters whose raw weights lie where the bound is not flat.

        With ``Clip`` that is [lo, hi]; the other bounds are strictly monotone, or flat by choice,
        as is ``Clip`` with ``recover`` off.
        """
        if not isinstance(self.bound, Clip) or not self.bound.recover:
            return params
        start = self.bound.raw(self.prior)
        return {
            "deviation": params["deviation"].clamp(self.bound.lo - start, self.bound.hi - start)
        }

    def weights(self, params: Params, index: Tensor) -> Tensor:
        """Weights [batch] of the rows ``index`` [batch] (int64), normalised."""
        weights = self.bound(self.raw_weights(params)[index])
        if self.normalise == "batch":
            return batch_mean_one(weights)
        if self.normalise == "table":
            return mean_one_over(weights, self.bound(self.raw_weights(params)))
        return weights

    def all_weights(self, params: Params) -> Tensor:
        """Weights of every row, [size]: what training would give each, mean 1 if normalised."""
        weights = self.bound(self.raw_weights(params).detach())
        return weights if self.normalise == "none" else mean_one(weights)


@dataclass(frozen=True)
class DomainTable:
    """``weight_d = softplus(raw_d) / mean_d softplus(raw_d)``, one row per domain.

    Attributes:
        size: number of domains.
        bound: map from raw weights to weights before the normalisation over domains.

    Source: DreamPRM, arXiv 2505.20241 (softplus, mean-normalised, raw weights start at 0).
    """

    size: int
    bound: Bound = Softplus()

    def __post_init__(self) -> None:
        """Refuse a table without rows, and a bound under which all start at weight 0 or below."""
        if self.size < 1:
            raise ValueError(f"DomainTable needs size >= 1; found {self.size}")
        if not float(self.bound(torch.zeros(()))) > 0.0:
            raise ValueError(
                f"DomainTable: {self.bound} gives raw weight 0, where all domains start, a weight "
                "that is not positive, and their mean cannot become 1; choose Softplus() or "
                "Sigmoid()"
            )

    def init(self) -> Params:
        """All domains alike: ``{"raw": zeros [size]}``."""
        return {"raw": torch.zeros(self.size)}

    def raw_weights(self, params: Params) -> Tensor:
        """Raw weights, [size]."""
        return params["raw"]

    def all_weights(self, params: Params) -> Tensor:
        """Weights of every domain, [size], mean 1 over the domains."""
        return mean_one(self.bound(params["raw"]))

    def weights(self, params: Params, domain: Tensor) -> Tensor:
        """Weights [batch] of the examples' domains ``domain`` [batch] (int64)."""
        return self.all_weights(params)[domain]
