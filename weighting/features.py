"""Features of the steps of an example and of the example itself, the inputs of Instance Net.

Those of steps are computed from what the process reward model says of a step and how the step is
labelled, those of examples from their size and domain: no field that tells the quality of a label
is among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

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


EXAMPLE_FEATURES = ("steps", "length", "domain")
"""Names of features that all steps of an example share."""


def is_model_feature(name: str) -> bool:
    """Whether a feature depends on the process reward model."""
    return name != "label" and name not in EXAMPLE_FEATURES


def feature_count(names: Sequence[str], *, reference: bool = False, domains: int = 0) -> int:
    """How many inputs a net on these features has.

    One per name; with ``reference`` a second one for each that depends on the model; "domain" has
    ``domains``.

    Raises:
        ValueError: a name that is not a feature; "domain" without domains.
    """
    for name in names:
        if name not in FEATURES and name not in EXAMPLE_FEATURES:
            known = ", ".join([*FEATURES, *EXAMPLE_FEATURES])
            raise ValueError(f"expected among {known}; found {name!r}")
    if "domain" in names and domains < 1:
        raise ValueError("the feature 'domain' needs examples that all name their domain")
    twice = sum(map(is_model_feature, names)) if reference else 0
    return len(names) + twice + (domains - 1 if "domain" in names else 0)


def example_features(
    names: Sequence[str],
    mask: Tensor,
    *,
    length: Tensor | None = None,
    domain: Tensor | None = None,
    domains: int = 0,
) -> Tensor:
    """Features [batch, steps, width] of each example, the same at each of its steps.

    Args:
        names: which, in this order; those that are not in ``EXAMPLE_FEATURES`` are left out.
            ``steps``: log₁₀(1 + number of steps); ``length``: log₁₀(tokens) / 4, so that 10,000
            tokens are 1; ``domain``: one column per domain, 1 in its own.
        mask: which steps exist, [batch, steps].
        length: tokens of each example, [batch].
        domain: number of each example's domain, [batch] int64.
        domains: how many domains there are.

    Raises:
        ValueError: a feature without the argument that it is computed from.
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
    return torch.cat(columns, dim=-1)[:, None, :].expand(-1, mask.shape[-1], -1)


def step_features(
    names: Sequence[str], step_probs: Tensor, labels: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Features [batch, steps, len(names)] of each step and the mask [batch, steps] to average by.

    Args:
        names: which features, from ``FEATURES``: ``p_plus`` and ``p_minus`` (the original's two
            inputs, blind to the label), ``label``, ``p_label`` (probability of the given label),
            ``loss`` (cross-entropy of the given label, in nats).
        step_probs: probability of "+" per step, [batch, steps].
        labels: labels in [0, 1], [batch, steps]; NaN where there is none.
        mask: which steps exist, [batch, steps]. Steps without a label are left out too.

    Raises:
        ValueError: a name that is not a feature.
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
