"""The bilevel problem of a process reward model and a weighting.

Lower level: cross-entropy of the step labels per example, times the example's weight, or of learned
labels. Upper level: the aggregated step scores of a meta solution are compared with whether its
answer is right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from bilevel import BilevelProblem, BilevelSolver, BilevelState, ReweightingProblem
from prm.aggregations import Aggregation
from prm.inputs.image_inputs import row_owners
from prm.losses import outcome_loss, pair_loss, step_cross_entropy, step_squared_error
from prm.models.model import PRM, step_logits
from prm.names import LossTarget
from prm.scoring import solution_scores, step_scores
from weighting import StepLabels, Weighting, batch_features, batch_mean_one

Params = Mapping[str, Tensor]
Batch = Mapping[str, Tensor]
Solver: TypeAlias = BilevelSolver[Params, Params, Batch]
State: TypeAlias = BilevelState[Params, Params]


@dataclass(frozen=True)
class Objective:
    """The losses of both levels.

    Attributes:
        prm: The model. Trained parameters are passed to the losses, the others are its own.
        aggregation: The map from step scores to a solution score, for the meta loss.
        loss_target: The target "both" or "+" (``prm.losses.outcome_loss``), or "pairs"
            (``prm.losses.pair_loss``).
        weighting: The weighting. Without one the weights are ``batch["weights"]``, or 1 if the
            batch has none.
        features: The names of the features of a weighting that reads features.
        reference: Whether such a weighting also reads the features of the initial model, from
            ``batch["reference_probs"]``.
        domains: The number of domains in ``batch["domain"]``, for the feature "domain".
        full_vocab: Whether probabilities in the losses of both levels are over the vocabulary
            instead of the two labels. Features are always over the labels.
        lower_loss: The loss "cross-entropy" (``prm.losses.step_cross_entropy``) or "squared"
            (``prm.losses.step_squared_error``).
        normalise_given: Whether ``batch["weights"]`` are divided by their mean in a micro-batch.
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
        """Return the mean loss over labelled steps, [batch], and two-way step probabilities."""
        full = self.full_vocab
        logits = step_logits(self.prm, lower, batch, full_vocab=full)
        labels, mask = batch["labels"], batch["step_mask"]
        if self.lower_loss == "squared":
            losses = step_squared_error(step_scores(logits, full_vocab=full), labels, mask)
        else:
            losses = step_cross_entropy(logits, labels, mask, full_vocab=full)
        # Log-probabilities have the same difference as logits, so this is two-way in both cases.
        return losses, {"step_probs": step_scores(logits)}

    def corrected_loss(self, lower: Params, upper: Params, batch: Batch) -> Tensor:
        """Return the mean over the examples of their losses with learned labels, a scalar.

            L = (1/B) Σ_i ℓ_i(θ; q_i(φ))

        ℓ_i is ``per_example_loss`` with the labels q of ``StepLabels`` in place of those given.
        """
        assert isinstance(self.weighting, StepLabels)
        learned = self.weighting.labels(upper, batch)
        losses, _ = self.per_example_loss(lower, {**batch, "labels": learned})
        return losses.mean()

    def weights(self, upper: Params, batch: Batch, features: Mapping[str, Tensor]) -> Tensor:
        """Return the weights of the examples of a batch, [batch]."""
        if self.weighting is not None:
            return self.weighting.batch_weights(upper, self.weighting_batch(batch, features))
        if "weights" in batch:
            given = batch["weights"]
            return batch_mean_one(given) if self.normalise_given else given
        return torch.ones(len(batch["labels"]), device=batch["labels"].device)

    @property
    def reads_features(self) -> bool:
        """Whether the weighting reads features."""
        return self.weighting is not None and "features" in self.weighting.reads

    @property
    def reads_reference(self) -> bool:
        """Whether it reads the step scores of the initial model, ``batch["reference_probs"]``."""
        if self.weighting is None:
            return False
        return "reference_probs" in self.weighting.reads or (self.reads_features and self.reference)

    @property
    def reads_gradient(self) -> bool:
        """Whether it reads features of the examples' gradients, ``batch["gradient"]``."""
        return self.reads_features and "gradient" in self.features

    @property
    def reads_domain(self) -> bool:
        """Whether it reads domains, by itself or as a feature."""
        if self.weighting is None:
            return False
        return "domain" in self.weighting.reads or (
            self.reads_features and "domain" in self.features
        )

    def weighting_batch(self, batch: Batch, outputs: Mapping[str, Tensor]) -> Batch:
        """Return what the weighting reads: the batch, the model's outputs, features of both.

        Args:
            batch: The batch of examples.
            outputs: The ``step_probs`` of the current model, [batch, steps].
        """
        read = {**batch, **outputs}
        if self.reads_features:
            read["features"], read["feature_mask"] = self.net_inputs(batch, outputs)
        return read

    def net_inputs(self, batch: Batch, outputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return features [batch, steps, features] and mask [batch, steps]: ``batch_features``."""
        return batch_features(
            {**batch, **outputs}, self.features, reference=self.reference, domains=self.domains
        )

    def upper_loss(self, lower: Params, upper: Params, batch: Batch) -> Tensor:
        """Return the mean meta loss of aggregated scores against the outcomes, a scalar."""
        loss, _ = self.upper_loss_and_scores(lower, upper, batch)
        return loss

    def upper_loss_and_scores(
        self, lower: Params, upper: Params, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the meta loss, and for the log mean score, share of right ones, moved labels."""
        logits = step_logits(self.prm, lower, batch, full_vocab=self.full_vocab)
        scores = solution_scores(
            logits, batch["step_mask"], self.aggregation, full_vocab=self.full_vocab
        )
        aux = {
            "meta/score": scores[..., 0].mean(),
            "meta/right": batch["correct"].to(scores).mean(),
        }
        if isinstance(self.weighting, StepLabels):
            aux |= self.weighting.moved(upper)
        if self.loss_target == "pairs":
            return pair_loss(scores[..., 0], batch["correct"], batch["group"]), aux
        return outcome_loss(scores, batch["correct"], self.loss_target).mean(), aux

    def upper_size(self, batch: Batch) -> int:
        """Return over how many terms the meta loss of a batch is a mean: solutions, or pairs."""
        if not batch:
            return 0
        if self.loss_target != "pairs":
            return len(batch["correct"])
        right = batch["correct"] == 1
        same = batch["group"][:, None] == batch["group"][None, :]
        return int((same & right[:, None] & ~right[None, :]).sum())

    def problem(
        self,
    ) -> ReweightingProblem[Params, Params, Batch] | BilevelProblem[Params, Params, Batch]:
        """Return the bilevel problem over dicts of parameters.

        With learned labels it is a generic one. φ is inside the loss of every step, so that an
        example has no weight to take out of it, and no single product ⟨μ, ∇ℓ_i⟩ that would serve
        all of its steps.
        """
        if isinstance(self.weighting, StepLabels):
            return BilevelProblem(
                lower_loss=self.corrected_loss,
                upper_loss=self.upper_loss_and_scores,
                batch_size=lambda batch: len(batch["labels"]),
            )
        return ReweightingProblem(
            per_example_loss=self.per_example_loss,
            weights=self.weights,
            upper_loss=self.upper_loss_and_scores,
            rows=row_owners,
        )
