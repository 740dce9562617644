"""Features of the steps of an example, the inputs of Instance Net.

All are computed from what the process reward model says of a step and how the step is labelled:
no field that tells the quality of a label is among them.
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
