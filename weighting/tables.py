"""Tables: one learnable weight per instance (DreamPRM-1.5) or per domain (DreamPRM)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from weighting.base import Batch, Params
from weighting.bounds import Bound, Clip, Softplus, mean_at_bound
from weighting.normalise import batch_mean_one, mean_one, mean_one_over


@dataclass(frozen=True)
class InstanceTable:
    """``weight_i = bound(raw(prior) + deviation_i)``, one row per instance.

    The parameter is the deviation from the prior, so that weight decay pulls a row back to the
    prior weight (that is 1, "as good as any"), not to weight 0.

    Attributes:
        size: Number of instances.
        prior: Weight of every instance at the start, and where decay pulls.
        bound: Map from raw weights to weights.
        normalise: "batch" (mean 1 within the batch), "table" (mean 1 over all rows) or "none".

    Source: DreamPRM-1.5, arXiv 2509.05542, Instance Table.
    """

    reads: ClassVar[tuple[str, ...]] = ("index",)
    row_key: ClassVar[Literal["index", "domain"] | None] = "index"

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

    @property
    def start(self) -> float:
        """The prior weight."""
        return self.prior

    def init(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """All weights at the prior: ``{"deviation": zeros [size]}``; nothing is drawn."""
        return {"deviation": torch.zeros(self.size)}

    def raw_weights(self, params: Params) -> Float[Tensor, " size"]:
        """Raw weights of every row."""
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

    def weights(self, params: Params, index: Int64[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Weights of the rows ``index``, normalised.

        Raises:
            ValueError: They cannot be normalised: a batch of one, or a mean near or below 0.
        """
        raw = self.bound.raw(self.prior) + params["deviation"][index]  # of no other row
        weights = self.bound(raw)
        if self.normalise == "batch":
            return batch_mean_one(weights)
        if self.normalise == "table":
            return mean_one_over(weights, self.bound(self.raw_weights(params)))
        return weights

    def all_weights(self, params: Params) -> Float[Tensor, " size"]:
        """Weights of every row: what training would give each, mean 1 if normalised."""
        weights = self.bound(self.raw_weights(params).detach())
        return weights if self.normalise == "none" else mean_one(weights)

    def batch_weights(self, params: Params, batch: Batch) -> Float[Tensor, " batch"]:
        """``weights`` of the examples' rows ``batch["index"]``."""
        return self.weights(params, batch["index"])

    def file_weights(
        self, params: Params, batches: Iterable[Batch]
    ) -> tuple[Float[Tensor, " examples"], Float[Tensor, " examples"]]:
        """Weights and raw weights of the examples' rows, normalised over the whole table."""
        index = torch.cat([batch["index"] for batch in batches])
        return self.all_weights(params)[index], self.raw_weights(params)[index]

    def share_at_bound(
        self, params: Params, weights: Float[Tensor, " batch"], tolerance: float = 0.01
    ) -> float:
        """``fraction_at_bound`` of all rows; ``weights`` are not looked at."""
        return float(self.rows_at_bound(params, tolerance))

    def rows_at_bound(self, params: Params, tolerance: float = 0.01) -> Float[Tensor, ""]:
        """Return ``share_at_bound`` as a tensor, for which the host does not wait for a device."""
        return mean_at_bound(self.raw_weights(params), self.bound, tolerance)


@dataclass(frozen=True)
class DomainTable:
    """``weight_d = softplus(raw_d) / mean_d softplus(raw_d)``, one row per domain.

    Attributes:
        size: Number of domains.
        bound: Map from raw weights to weights before the normalisation over domains.

    Source: DreamPRM, arXiv 2505.20241 (softplus, mean-normalised, raw weights start at 0).
    """

    reads: ClassVar[tuple[str, ...]] = ("domain",)
    row_key: ClassVar[Literal["index", "domain"] | None] = "domain"
    start: ClassVar[float] = 1.0  # normalised, whatever the bound makes of raw weight 0

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

    def init(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """All domains alike: ``{"raw": zeros [size]}``; nothing is drawn."""
        return {"raw": torch.zeros(self.size)}

    def raw_weights(self, params: Params) -> Float[Tensor, " size"]:
        """Raw weights of every domain."""
        return params["raw"]

    def project(self, params: Params) -> Params:
        """``params``: no bound of a Domain Table is flat anywhere."""
        return params

    def all_weights(self, params: Params) -> Float[Tensor, " size"]:
        """Weights of every domain, mean 1 over the domains."""
        return mean_one(self.bound(params["raw"]))

    def weights(self, params: Params, domain: Int64[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Weights of the examples whose domains are ``domain``."""
        return self.all_weights(params)[domain]

    def batch_weights(self, params: Params, batch: Batch) -> Float[Tensor, " batch"]:
        """``weights`` of the examples' domains ``batch["domain"]``."""
        return self.weights(params, batch["domain"])

    def file_weights(
        self, params: Params, batches: Iterable[Batch]
    ) -> tuple[Float[Tensor, " examples"], Float[Tensor, " examples"]]:
        """Weights and raw weights of the examples' domains; weights have mean 1 over the file."""
        domain = torch.cat([batch["domain"] for batch in batches])
        weights = self.all_weights(params)[domain]
        return weights / weights.mean(), self.raw_weights(params)[domain]

    def share_at_bound(
        self, params: Params, weights: Float[Tensor, " batch"], tolerance: float = 0.01
    ) -> float:
        """``fraction_at_bound`` of all domains; ``weights`` are not looked at."""
        return float(self.rows_at_bound(params, tolerance))

    def rows_at_bound(self, params: Params, tolerance: float = 0.01) -> Float[Tensor, ""]:
        """Return ``share_at_bound`` as a tensor, for which the host does not wait for a device."""
        return mean_at_bound(self.raw_weights(params), self.bound, tolerance)
