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
from prm.inputs.image_inputs import row_owners
from prm.losses import outcome_loss, pair_loss, step_cross_entropy, step_squared_error
from prm.models.model import PRM, step_logits
from prm.names import LossTarget
from prm.scoring import solution_scores, step_scores
from weighting import (
    EXAMPLE_FEATURES,
    DomainTable,
    InstanceNet,
    InstanceTable,
    Weighting,
    batch_mean_one,
    example_features,
    is_model_feature,
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
        domains: how many domains ``batch["domain"]`` counts, for the feature "domain".
        full_vocab: probabilities in both levels' losses are over the vocabulary, not the two
            labels. Features of Instance Net are over the labels always.
        lower_loss: "cross-entropy" (``prm.losses.step_cross_entropy``) or "squared"
            (``prm.losses.step_squared_error``).
        normalise_given: ``batch["weights"]`` are divided by the mean of their micro-batch.
    """

    prm: PRM
    aggregation: Aggregation
    loss_target: LossTarget | Literal["pairs"]
    weighting: Weighting | None
    features: tuple[str, ...] = ()
    reference: bool = False
    domains: int = 0
    full_vocab: bool = False
    lower_loss: Literal["cross-entropy", "squared"] = "cross-entropy"
    normalise_given: bool = True

    def per_example_loss(self, lower: Params, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over the labelled steps, [batch], and two-way step probabilities."""
        full = self.full_vocab
        logits = step_logits(self.prm, lower, batch, full_vocab=full)
        labels, mask = batch["labels"], batch["step_mask"]
        if self.lower_loss == "squared":
            losses = step_squared_error(step_scores(logits, full_vocab=full), labels, mask)
        else:
            losses = step_cross_entropy(logits, labels, mask, full_vocab=full)
        # Log-probabilities differ as the logits do, so this is two-way in either case.
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
            given = batch["weights"]
            return batch_mean_one(given) if self.normalise_given else given
        return torch.ones(len(batch["labels"]))

    def net_inputs(self, batch: Batch, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Instance Net's features [batch, steps, features] and mask [batch, steps].

        Those of steps, then the same under the initial model, then those of examples; each in the
        order of ``features``.
        """
        labels, mask = batch["labels"], batch["step_mask"]
        names = tuple(name for name in self.features if name not in EXAMPLE_FEATURES)
        inputs, known = step_features(names, features["step_probs"], labels, mask)
        if self.reference:
            names = tuple(filter(is_model_feature, self.features))
            before, _ = step_features(names, batch["reference_probs"], labels, mask)
            inputs = torch.cat([inputs, before], dim=-1)
        if len(set(self.features) & set(EXAMPLE_FEATURES)):
            shared = example_features(
                self.features,
                mask,
                length=batch["attention_mask"].sum(-1) if "attention_mask" in batch else None,
                domain=batch.get("domain"),
                domains=self.domains,
            )
            inputs = torch.cat([inputs, shared.to(inputs.dtype)], dim=-1)
        return inputs, known

    def upper_loss(self, lower: Params, upper: Params, batch: Batch) -> Tensor:
        """Mean meta loss: squared distance of aggregated scores from right answers, scalar."""
        logits = step_logits(self.prm, lower, batch, full_vocab=self.full_vocab)
        scores = solution_scores(
            logits, batch["step_mask"], self.aggregation, full_vocab=self.full_vocab
        )
        if self.loss_target == "pairs":
            return pair_loss(scores[..., 0], batch["correct"], batch["group"])
        return outcome_loss(scores, batch["correct"], self.loss_target).mean()

    def problem(self) -> ReweightingProblem:
        """The bilevel problem over parameter dicts."""
        return ReweightingProblem(
            per_example_loss=self.per_example_loss,
            weights=self.weights,
            upper_loss=self.upper_loss,
            rows=row_owners,
        )
