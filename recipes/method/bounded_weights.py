"""Bounded weights, one of the three devices that keep instance reweighting stable.

An unbounded weight can run away: it multiplies a loss, so a large one is a large learning rate for
one example, and a negative one trains on its opposite. So a raw weight, which may be any number,
is mapped by a bound to a weight in a given range (``weighting.bounds``),

    weight = bound(raw weight) in [low, high],    weight = prior at the start,

and weights are divided by their mean (``weighting.normalise``), so that they compare examples and
do not act as a second learning rate. DreamPRM-1.5 (arXiv 2509.05542) clamps a table to [-1, 3] and
applies a sigmoid to the output of a net. The derivative of a clamp is 0 beyond its ends, so a
weight that overshot could never return. With ``--bound clip`` it can (``weighting.Clip``), and
``make_solver`` projects the parameters after every upper step.

This module chooses the weighting and its bound from the options. A new weighting is registered in
``WEIGHTINGS`` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from recipes.options.choices import (
    BoundedOptions,
    DomainOptions,
    LabelsOptions,
    NetOptions,
    TableOptions,
)
from recipes.options.train import TrainOptions
from recipes.options.values import blaming
from weighting import (
    Bound,
    Clip,
    DomainTable,
    InstanceNet,
    InstanceTable,
    LeakyReLU,
    Sigmoid,
    Softplus,
    StepLabels,
    Unbounded,
    Weighting,
    feature_count,
)


@dataclass(frozen=True)
class Registration:
    """A weighting that ``--weighting`` can name.

    Attributes:
        kind: Its class. A saved weighting is found by the name of the class.
        row: The row of ``results.json`` for a run with this weighting.
        build: A function that builds it from the options, the numbers of instances and domains in
            the training file, and the most steps of an instance.
    """

    kind: type[Weighting]
    row: str
    build: Callable[[TrainOptions, int, int, int], Weighting]


def make_bound(settings: BoundedOptions) -> Bound:
    """Return the bound that the options of a weighting name."""
    low, high = settings.bound_low, settings.bound_high
    bounds: dict[str, Callable[[], Bound]] = {
        "clip": lambda: Clip(low, high),
        "clamp": lambda: Clip(low, high, recover=False),
        "sigmoid": lambda: Sigmoid(high),
        "softplus": Softplus,
        "leaky-relu": LeakyReLU,
        "relu": lambda: LeakyReLU(0.0),
        "none": Unbounded,
    }
    return bounds[settings.bound]()


def _instance_net(options: TrainOptions, instances: int, domains: int, steps: int) -> InstanceNet:
    settings = options.weighting
    assert isinstance(settings, NetOptions)
    bound = make_bound(settings)
    by_batch = settings.normalise == "batch"
    _check_batches(options, settings.centre or by_batch, "--normalise none --no-centre")
    with blaming("--features"):
        features = feature_count(
            settings.features,
            reference=settings.reference_features,
            domains=domains,
            gradient=settings.gradient_features,
        )
    return InstanceNet(
        features,
        settings.hidden,
        settings.layers,
        settings.prior,
        bound,
        centre=settings.centre,
        normalise=by_batch,
    )


def _instance_table(
    options: TrainOptions, instances: int, domains: int, steps: int
) -> InstanceTable:
    settings = options.weighting
    assert isinstance(settings, TableOptions)
    bound = make_bound(settings)
    _check_batches(options, settings.normalise == "batch", "--normalise table")
    return InstanceTable(instances, settings.prior, bound, settings.normalise)


def _domain_table(options: TrainOptions, instances: int, domains: int, steps: int) -> DomainTable:
    settings = options.weighting
    assert isinstance(settings, DomainOptions)
    bound = make_bound(settings)
    if not float(bound(torch.zeros(()))) > 0:
        raise ValueError(
            f"domain weights start at bound(0), which is 0 for --bound {settings.bound}; "
            "use softplus or sigmoid"
        )
    return DomainTable(domains, bound)


def _step_labels(options: TrainOptions, instances: int, domains: int, steps: int) -> StepLabels:
    settings = options.weighting
    assert isinstance(settings, LabelsOptions)
    with blaming(f"--label-trust {settings.label_trust}"):
        return StepLabels(instances, steps, settings.label_trust)


WEIGHTINGS: dict[str, Registration] = {
    "net": Registration(InstanceNet, "instance_net", _instance_net),
    "table": Registration(InstanceTable, "instance_table", _instance_table),
    "domain": Registration(DomainTable, "domain_table", _domain_table),
    "labels": Registration(StepLabels, "step_labels", _step_labels),
}
"""All weightings that ``--weighting`` can name, except "none"."""


def make_weighting(
    options: TrainOptions, instances: int, domains: int, steps: int = 1
) -> Weighting | None:
    """Return the weighting that the options name, or None for "none".

    Args:
        options: The options of the run.
        instances: The number of examples of the training file.
        domains: The number of domains of the training file, 0 if an example has none.
        steps: The most steps of an example of the training file.

    Raises:
        OptionError: The options contradict each other.
    """
    if options.weighting.kind == "none":
        return None
    with blaming(f"--weighting {options.weighting.kind}"):
        return WEIGHTINGS[options.weighting.kind].build(options, instances, domains, steps)


def _check_batches(options: TrainOptions, compared: bool, remedy: str) -> None:
    """Refuse batches of a single example if weights are compared within the batch."""
    if options.lower.batch_size == 1 and compared:
        raise ValueError(
            "weights are compared within a micro-batch, and the only example of --batch-size 1 "
            f"always gets the same weight; use 2 or more, or {remedy}"
        )
