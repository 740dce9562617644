"""Features of the steps of an example and of the example itself, the inputs of Instance Net.

Those of steps are computed from what the process reward model says of a step and how the step is
labelled, those of examples from their size and domain: no field that tells the quality of a label
is among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from weighting.base import Batch

_PROBABILITY_FLOOR = 1e-6


def _plus(probs: Tensor, labels: Tensor) -> Tensor:
    return probs


def _minus(probs: Tensor, labels: Tensor) -> Tensor:
    return 1 - probs


def _label(probs: Tensor, labels: Tensor) -> Tensor:
    return labels


def _agreement(probs: Tensor, labels: Tensor) -> Tensor:
    return labels * probs + (1 - labels) * (1 - probs)


def _loss(probs: Tensor, labels: Tensor) -> Tensor:
    clipped = probs.clamp(_PROBABILITY_FLOOR, 1 - _PROBABILITY_FLOOR)
    return -(labels * clipped.log() + (1 - labels) * torch.log1p(-clipped))


FEATURES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "p_plus": _plus,
    "p_minus": _minus,
    "label": _label,
    "p_label": _agreement,
    "loss": _loss,
}
"""Feature name -> function of (step probabilities of "+", labels in [0, 1])."""


EXAMPLE_FEATURES = ("steps", "length", "domain", "gradient")
"""Names of features that all steps of an example share."""


def is_model_feature(name: str) -> bool:
    """Whether a feature depends on the process reward model."""
    return name != "label" and name not in EXAMPLE_FEATURES


def feature_count(
    names: Sequence[str], *, reference: bool = False, domains: int = 0, gradient: int = 0
) -> int:
    """How many inputs a net on these features has: the width of ``batch_features``.

    Args:
        names: Names of the features, one input each; "domain" has ``domains``, "gradient" has
            ``gradient``.
        reference: A second input for each feature that depends on the model.
        domains: Number of domains.
        gradient: Number of gradient features (``weighting.gradients``).

    Raises:
        ValueError: A name that is not a feature; "domain" without domains, "gradient" without a
            number of them.
    """
    for name in names:
        if name not in FEATURES and name not in EXAMPLE_FEATURES:
            known = ", ".join([*FEATURES, *EXAMPLE_FEATURES])
            raise ValueError(f"expected among {known}; found {name!r}")
    if "domain" in names and domains < 1:
        raise ValueError("the feature 'domain' needs examples that all name their domain")
    if "gradient" in names and gradient < 1:
        raise ValueError(f"the feature 'gradient' needs 1 component or more; found {gradient}")
    twice = sum(map(is_model_feature, names)) if reference else 0
    wide = (domains - 1 if "domain" in names else 0) + (gradient - 1 if "gradient" in names else 0)
    return len(names) + twice + wide


def batch_features(
    batch: Batch, names: Sequence[str], *, reference: bool = False, domains: int = 0
) -> tuple[Float[Tensor, "batch steps features"], Bool[Tensor, "batch steps"]]:
    """Features of a batch, the inputs of Instance Net, and the steps to average over.

    Those of steps, then the same under the initial model, then those of examples; each in the order
    of ``names``.

    Args:
        batch: Holds ``labels``, ``step_mask``, ``step_probs``; with ``reference`` also
            ``reference_probs`` [batch, steps], p("+") under the initial model; ``attention_mask``,
            ``domain`` and ``gradient`` [batch, components] where a feature is computed from them.
        names: Names of the features, from ``FEATURES`` and ``EXAMPLE_FEATURES``.
        reference: Also give those that depend on the model under the initial model.
        domains: Number of domains.

    Raises:
        ValueError: A name that is not a feature; a feature without what it is computed from.
    """
    labels, mask = batch["labels"], batch["step_mask"]
    of_steps = tuple(name for name in names if name not in EXAMPLE_FEATURES)
    features, known = step_features(of_steps, batch["step_probs"], labels, mask)
    if reference:
        of_model = tuple(filter(is_model_feature, names))
        before, _ = step_features(of_model, batch["reference_probs"], labels, mask)
        features = torch.cat([features, before], dim=-1)
    if set(names) & set(EXAMPLE_FEATURES):
        shared = example_features(
            names,
            mask,
            length=batch["attention_mask"].sum(-1) if "attention_mask" in batch else None,
            domain=batch.get("domain"),
            domains=domains,
            gradient=batch.get("gradient"),
        )
        features = torch.cat([features, shared.to(features.dtype)], dim=-1)
    return features, known


def example_features(
    names: Sequence[str],
    mask: Bool[Tensor, "batch steps"],
    *,
    length: Int64[Tensor, " batch"] | None = None,
    domain: Int64[Tensor, " batch"] | None = None,
    domains: int = 0,
    gradient: Float[Tensor, "batch components"] | None = None,
) -> Float[Tensor, "batch steps width"]:
    """Features of each example, the same at each of its steps.

    Args:
        names: Names of the features, in order; those that are not in ``EXAMPLE_FEATURES`` are left
            out. ``steps``: log₁₀(1 + number of steps); ``length``: log₁₀(tokens) / 4, so that
            10,000 tokens are 1; ``domain``: one column per domain, 1 in its own; ``gradient``: the
            columns of that argument.
        mask: Which steps exist.
        length: Tokens of each example.
        domain: Number of each example's domain.
        domains: How many domains there are.
        gradient: Gradient features of each example (``weighting.gradients.GradientFeatures``).

    Raises:
        ValueError: A feature without the argument that it is computed from.
    """
    columns = [torch.zeros(len(mask), 0, device=mask.device)]
    for name in names:
        if name == "steps":
            columns.append(torch.log10(1.0 + mask.sum(-1))[:, None])
        elif name == "length":
            if length is None:
                raise ValueError("the feature 'length' needs the number of tokens of each example")
            columns.append(torch.log10(length.clamp(min=1).to(torch.float32))[:, None] / 4)
        elif name == "domain":
            if domain is None or domains < 1:
                raise ValueError("the feature 'domain' needs the domain of each example")
            columns.append(torch.nn.functional.one_hot(domain, domains).to(torch.float32))
        elif name == "gradient":
            if gradient is None:
                raise ValueError("the feature 'gradient' needs those of each example's gradient")
            columns.append(gradient.to(mask.device, torch.float32))
    return torch.cat(columns, dim=-1)[:, None, :].expand(-1, mask.shape[-1], -1)


def step_features(
    names: Sequence[str],
    step_probs: Float[Tensor, "batch steps"],
    labels: Float[Tensor, "batch steps"],
    mask: Bool[Tensor, "batch steps"],
) -> tuple[Float[Tensor, "batch steps names"], Bool[Tensor, "batch steps"]]:
    """Features of each step, one per name, and the steps to average over.

    Args:
        names: Names of the features, from ``FEATURES``: ``p_plus`` and ``p_minus`` (the original's
            two inputs, blind to the label), ``label``, ``p_label`` (probability of the given
            label), ``loss`` (cross-entropy of the given label, in nats).
        step_probs: Probability of "+" per step.
        labels: Labels in [0, 1]; NaN where there is none.
        mask: Which steps exist. Steps without a label are left out too.

    Raises:
        ValueError: A name that is not a feature.
    """
    for name in names:
        if name not in FEATURES:
            raise ValueError(f"unknown step feature {name!r}; expected among {', '.join(FEATURES)}")
    known = mask & ~labels.isnan()
    filled = torch.where(known, labels, 0.0).to(step_probs.dtype)
    probs = torch.where(known, step_probs, 0.5)
    if not names:
        return probs.new_zeros(*probs.shape, 0), known
    return torch.stack([FEATURES[name](probs, filled) for name in names], dim=-1), known
