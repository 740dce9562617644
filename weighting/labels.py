"""Learned labels: the label of every step is what the upper level moves, not the example's weight.

With labels as upper variables an example whose labels are wrong is not dropped but corrected: what
it says of the other class is used. An example of T labelled steps has T parameters in place of one,
each of which is moved by the hypergradient of its own step alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from weighting.base import Batch, Params
from weighting.bounds import Bound, Sigmoid

_PROBABILITY = Sigmoid(1.0)


@dataclass(frozen=True)
class StepLabels:
    """A soft label in (0, 1) for every labelled step, which starts close to the given label.

    With the given label y of step s of example i, and the trust c in it::

        q⁰_is = (1 − c) + (2c − 1) y_is            the prior: c for "+", 1 − c for "-"
        q_is  = σ(logit q⁰_is + φ_is),   φ_is = 0 at the start

    q takes the place of y in the lower loss. The prior is what is known of a step whose label is
    right with probability c, whichever it is; a soft (Monte Carlo) label 1/2 stays 1/2 for every c.
    The parameter is the deviation φ in logits, so that weight decay pulls a label back to its
    prior. For the cross-entropy of an example of |T_i| labelled steps in a batch of B::

        ∂L/∂φ_is = −q_is (1 − q_is) z_is / (B |T_i|),   z = log p₊ − log p₋

    so that ∂/∂φ_is ⟨∇_θ L, μ⟩ is a directional derivative of the logits z along μ: forward mode,
    one pass for all steps of a batch. The products ⟨μ, ∇ℓ_i⟩ that the routes per example compute
    are one number for all steps of an example, and say nothing of each.

    A weighting like the others, except that it has labels in place of weights. Where a weight of an
    example is wanted, it is how far its labels are where they were, its *agreement*::

        a_i = 1 − mean over its labelled steps of |q_is − q⁰_is|

    Attributes:
        size: Number of instances.
        steps: Most steps of an instance.
        trust: c, in (1/2, 1).
        bound: The map from logits to labels, which is fixed.

    Source: labels as upper variables are described by DreamPRM-Code, arXiv 2512.15000; prior,
    parameters and bound are this library's own.
    """

    reads: ClassVar[tuple[str, ...]] = ("index", "labels")
    row_key: ClassVar[Literal["index", "domain"] | None] = "index"

    size: int
    steps: int
    trust: float = 0.9
    bound: Bound = _PROBABILITY

    def __post_init__(self) -> None:
        """Refuse a table without entries, a trust that says nothing, and another bound."""
        for name in ("size", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"StepLabels needs {name} >= 1; found {getattr(self, name)}")
        if not 0.5 < self.trust < 1.0:
            raise ValueError(
                f"StepLabels needs a trust above 0.5 and below 1; found {self.trust}: at 0.5 given "
                "labels say nothing, and a label that is trusted fully cannot move"
            )
        if self.bound != _PROBABILITY:
            raise ValueError(f"StepLabels needs the bound {_PROBABILITY}; found {self.bound}")

    @property
    def start(self) -> float:
        """The trust: the label "+" before the first upper step."""
        return self.trust

    @property
    def turn(self) -> float:
        """2 logit c: the way from the prior of one label to that of the other, in logits."""
        return 2.0 * math.log(self.trust / (1.0 - self.trust))

    def init(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """All labels at their priors: ``{"deviation": zeros [size, steps]}``; nothing is drawn."""
        return {"deviation": torch.zeros(self.size, self.steps)}

    def prior(self, labels: Float[Tensor, "batch steps"]) -> Float[Tensor, "batch steps"]:
        """Return the labels q⁰ before the first upper step; NaN where there is none."""
        return (1.0 - self.trust) + (2.0 * self.trust - 1.0) * labels

    def labels(self, params: Params, batch: Batch) -> Float[Tensor, "batch steps"]:
        """Return the labels q of the examples of a batch, differentiable in ``params``.

        Args:
            params: The deviations.
            batch: Holds ``index`` and the given ``labels``, NaN where there is none.

        Returns:
            The labels, NaN where there is none.

        Raises:
            ValueError: The batch has examples of more steps than the table.
        """
        given = batch["labels"]
        if given.shape[1] > self.steps:
            raise ValueError(
                f"StepLabels has labels for {self.steps} steps; found a batch of examples with up "
                f"to {given.shape[1]}"
            )
        known = ~given.isnan()
        # Without a label a number all the same: 0 times a derivative that is NaN is NaN.
        start = torch.logit(self.prior(torch.where(known, given, 0.5)))
        deviation = params["deviation"][batch["index"], : given.shape[1]]
        return torch.where(known, self.bound(start + deviation), torch.nan)

    def batch_weights(self, params: Params, batch: Batch) -> Float[Tensor, " batch"]:
        """Agreement of the examples; no loss is multiplied by it."""
        return 1.0 - (self.labels(params, batch) - self.prior(batch["labels"])).abs().nanmean(-1)

    def file_weights(
        self, params: Params, batches: Iterable[Batch]
    ) -> tuple[Float[Tensor, " examples"], Float[Tensor, " examples"]]:
        """Return agreement, and how far the upper level supports the given labels.

        The support of an example, its raw weight, is the mean of (2y − 1) φ over its labelled
        steps: negative where the labels moved away from those given, in logits.
        """
        found = [(self.batch_weights(params, one), self._support(params, one)) for one in batches]
        agreements, supports = zip(*found, strict=True)
        return torch.cat(agreements), torch.cat(supports)

    def _support(self, params: Params, batch: Batch) -> Float[Tensor, " batch"]:
        given = batch["labels"]
        deviation = params["deviation"][batch["index"], : given.shape[1]]
        return ((2.0 * given - 1.0) * deviation).nanmean(-1)

    def project(self, params: Params) -> Params:
        """Return the nearest parameters with |φ| at most ``turn``: turned over, and no further."""
        return {"deviation": params["deviation"].clamp(-self.turn, self.turn)}

    def share_at_bound(
        self, params: Params, weights: Float[Tensor, " batch"], tolerance: float = 0.01
    ) -> float:
        """Return the share of agreements at 0: examples all of whose labels were turned over."""
        turned_over = 2.0 * self.trust - 1.0
        return float((weights <= 1.0 - turned_over + tolerance).float().mean())

    def moved(self, params: Params) -> dict[str, Float[Tensor, ""]]:
        """Return how far labels have moved, in logits, for the log.

        Returns:
            ``labels/moved``: the mean |φ| of those that have; ``labels/most``: the largest |φ|.
        """
        distance = params["deviation"].detach().abs()
        count = (distance > 0).sum().clamp(min=1)
        return {"labels/moved": distance.sum() / count, "labels/most": distance.max()}
