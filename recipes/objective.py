"""Where the three packages meet: a process reward model and a weighting become a bilevel problem.

Lower level: cross-entropy of the step labels per example, times the example's weight. Upper level:
aggregate the step scores of a meta solution and compare with whether its answer was right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bilevel import ReweightingProblem
from prm.aggregations import Aggregation
from prm.losses import LossTarget, outcome_loss, pair_loss, step_cross_entropy
from prm.model import PRM, step_logits
from prm.scoring import solution_scores, step_scores
from weighting import (
    DomainTable,
    InstanceNet,
    InstanceTable,
    Weighting,
    batch_mean_one,
    step_features,
)

Params = Mapping[str, Tensor]
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """What is optimised, apart from how.

    Attributes:
        prm: the model; parameters that are trained are passed in, the others are its own.
        aggregation: step scores to solution score, for the meta loss.
        loss_target: "both" or "+" (``prm.losses.outcome_loss``), or "pairs"
            (``prm.losses.pair_loss``).
        weighting: how weights are made; None: ``batch["weights"]``, or 1 where there is none.
        features: names of Instance Net's features.
        reference: Instance Net also gets the features under ``batch["reference_probs"]``.
    """

    prm: PRM
    aggregation: Aggregation
    loss_target: LossTarget | Literal["pairs"]
    weighting: Weighting | None
    features: tuple[str, ...] = ()
    reference: bool = False

    def per_example_loss(self, lower: Params, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy over the labelled steps, [batch], and step probabilities."""
        logits = step_logits(self.prm, lower, batch)
        losses = step_cross_entropy(logits, batch["labels"], batch["step_mask"])
        return losses, {"step_probs": step_scores(logits)}

    def weights(self, upper: Params, batch: Batch, features: Mapping[str, Tensor]) -> Tensor:
        """Weights [batch] of the examples of a batch."""
        if isinstance(self.weighting, InstanceTable):
            return self.weighting.weights(dict(upper), batch["index"])
        if isinstance(self.weighting, DomainTable):
            return self.weighting.weights(dict(upper), batch["domain"])
        if isinstance(self.weighting, InstanceNet):
            return self.weighting.weights(dict(upper), *self.net_inputs(batch, features))
        if "weights" in batch:
            return batch_mean_one(batch["weights"])
        return torch.ones(len(batch["labels"]))

    def net_inputs(self, batch: Batch, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Instance Net's features [batch, steps, features] and mask [batch, steps]."""
        labels, mask = batch["labels"], batch["step_mask"]
        inputs, known = step_features(self.features, features["step_probs"], labels, mask)
        if self.reference:
            names = tuple(name for name in self.features if name != "label")
            before, _ = step_features(names, batch["reference_probs"], labels, mask)
            inputs = torch.cat([inputs, before], dim=-1)
        return inputs, known

    def upper_loss(self, lower: Params, upper: Params, batch: Batch) -> Tensor:
        """Mean meta loss: squared distance of aggregated scores from right answers, scalar."""
        logits = step_logits(self.prm, lower, batch)
        scores = solution_scores(logits, batch["step_mask"], self.aggregation)
        if self.loss_target == "pairs":
            return pair_loss(scores[..., 0], batch["correct"], batch["group"])
        return outcome_loss(scores, batch["correct"], self.loss_target).mean()

    def problem(self) -> ReweightingProblem:
        """The bilevel problem over parameter dicts."""
        return ReweightingProblem(
            per_example_loss=self.per_example_loss,
            weights=self.weights,
            upper_loss=self.upper_loss,
            rows=tile_owners,
        )


def tile_owners(batch: Batch) -> dict[int, Tensor]:
    """Which example each image tile belongs to: inside the vision tower tiles lead, not examples.

    Returns:
        ``{tiles: owner [tiles]}``; empty for a batch without images.
    """
    if "pixel_values" not in batch:
        return {}
    owners = torch.arange(len(batch["num_patches"])).repeat_interleave(batch["num_patches"])
    return {len(owners): owners}
