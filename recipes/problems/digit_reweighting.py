"""Weights for the training rows of a digit classifier, learned or fixed: an example of the core.

The lower level is a small network, with each row's loss times its weight. The upper level is the
loss on clean scans. ``instance_table``, ``meta_weight_net`` and ``make_solver`` are all that the
core needs; the rules at the end need no upper level and serve as baselines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from bilevel import (
    Adam,
    AdamW,
    BilevelSolver,
    LazyRowAdam,
    OneStep,
    Optimizer,
    PerExample,
    ReweightingProblem,
    Schedule,
)
from recipes.problems.digit_scans import CLASSES, PIXELS
from weighting import InstanceNet, InstanceTable, batch_mean_one

Params = dict[str, Tensor]
Batch = Mapping[str, Any]


class Weighting(NamedTuple):
    """The initial φ, weights(φ, batch, losses) -> [batch], and the optimizer of φ or None."""

    phi: Params
    weights: Callable[[Params, Batch, Tensor], Tensor]
    optimizer: Optimizer | None


def instance_table(rows: int, lr: float | Schedule) -> Weighting:
    """Return one weight in [0, 2] per training row, with mean 1 in the batch."""
    table = InstanceTable(rows)
    return Weighting(
        table.init(),
        lambda phi, batch, losses: table.weights(phi, batch["row"]),
        LazyRowAdam(lr),  # It updates only the rows in the batch.
    )


def meta_weight_net(lr: float | Schedule, generator: torch.Generator) -> Weighting:
    """Return a network from a row's loss to its weight in (0, 2), with mean 1 in the batch.

    It has 100 hidden units. Source: Meta-Weight-Net of Shu et al. 2019 (arXiv 1902.07379), which
    does not centre the weights; without centring all weights converged to 0 here.
    """
    net = InstanceNet(features=1, hidden=100)

    def weights(phi: Params, batch: Batch, losses: Tensor) -> Tensor:
        one_step = torch.ones(len(losses), 1, dtype=torch.bool)
        return net.weights(phi, losses[:, None, None], one_step)

    return Weighting(net.init(generator), weights, Adam(lr))


def logits(theta: Params, x: Tensor) -> Tensor:
    """Return the logits [batch, 10] of scans [batch, 64] by a network with one hidden layer."""
    hidden = torch.relu(linear(x, theta["in.weight"], theta["in.bias"]))
    return linear(hidden, theta["out.weight"], theta["out.bias"])


def make_solver(
    weighting: Weighting, lr: float, warm_up: int = 0
) -> BilevelSolver[Params, Params, Batch]:
    """Return the solver for both losses; a row's weight may depend on its loss."""

    def per_example_loss(theta: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        losses = cross_entropy(logits(theta, batch["x"]), batch["y"], reduction="none")
        return losses, losses

    def meta_loss(theta: Params, phi: Params, batch: Batch) -> Tensor:
        return cross_entropy(logits(theta, batch["x"]), batch["y"])

    return BilevelSolver(
        ReweightingProblem(per_example_loss, weighting.weights, meta_loss),
        lower_optimizer=AdamW(lr),
        upper_optimizer=weighting.optimizer or Adam(0.0),
        hypergradient=OneStep(PerExample()),  # Exact through the last step of AdamW.
        upper_start=warm_up,
    )


def init_network(hidden: int, generator: torch.Generator) -> Params:
    """Return weights uniform in ±1/√fan_in, and biases of 0."""

    def uniform(rows: int, columns: int) -> Tensor:
        return (2 * torch.rand(rows, columns, generator=generator) - 1) / math.sqrt(columns)

    return {
        "in.weight": uniform(hidden, PIXELS),
        "in.bias": torch.zeros(hidden),
        "out.weight": uniform(CLASSES, hidden),
        "out.bias": torch.zeros(CLASSES),
    }


def uniform() -> Weighting:
    """Return the constant weight 1."""
    return Weighting({}, lambda phi, batch, losses: torch.ones_like(losses), None)


def small_loss(share: float, warm_up: int) -> Weighting:
    """Weight only the ``share`` of every batch with the least loss, from step ``warm_up`` on.

    The share of right labels must be known. The batch holds the number of its step.
    """

    def weights(phi: Params, batch: Batch, losses: Tensor) -> Tensor:
        if batch["step"] < warm_up:
            return torch.ones_like(losses)
        kept = max(1, round(share * len(losses)))
        return batch_mean_one((losses <= losses.kthvalue(kept).values).to(losses))

    return Weighting({}, weights, None)


def inverse_frequency(labels: Tensor) -> Weighting:
    """Weight a row ``rows / (classes · rows of the class)``, so that all classes count the same."""
    counts = torch.bincount(labels, minlength=CLASSES)
    by_class = len(labels) / (CLASSES * counts.clamp(min=1))
    return Weighting({}, lambda phi, batch, losses: by_class.to(losses)[batch["y"]], None)
