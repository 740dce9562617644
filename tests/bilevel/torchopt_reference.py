"""A reweighting problem and optimizers that TorchOpt has too."""

from __future__ import annotations

import torch
import torchopt

from bilevel import SGD, Adam, AdamW, ReweightingProblem

OPTIMIZERS = {
    "sgd": (SGD(0.1), lambda: torchopt.sgd(0.1)),
    "momentum": (SGD(0.1, momentum=0.9), lambda: torchopt.sgd(0.1, momentum=0.9)),
    "adam": (Adam(0.01), lambda: torchopt.adam(0.01)),
    "adamw": (AdamW(0.01, weight_decay=0.1), lambda: torchopt.adamw(0.01, weight_decay=0.1)),
}
"""Optimizers of ours, and what makes the same one of TorchOpt."""


def problem():
    """A network of two layers whose examples are weighted by a sigmoid each."""

    def losses(theta, batch):
        hidden = torch.tanh(batch["x"] @ theta["w1"])
        logits = hidden @ theta["w2"]
        return torch.nn.functional.cross_entropy(logits, batch["y"], reduction="none"), None

    return ReweightingProblem(
        per_example_loss=losses,
        weights=lambda phi, batch, features: torch.sigmoid(phi["raw"]),
        upper_loss=lambda theta, phi, batch: losses(theta, batch)[0].mean(),
    )


def data():
    """Lower and upper parameters, a training and an upper batch, float64."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    theta = {"w1": 0.5 * randn(4, 6), "w2": 0.5 * randn(6, 3)}
    batches = [
        {"x": randn(n, 4), "y": torch.randint(0, 3, (n,), generator=generator)} for n in (8, 5)
    ]
    return theta, {"raw": randn(8)}, *batches
