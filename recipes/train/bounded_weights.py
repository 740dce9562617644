"""Bounded weights, one of the three devices that keep instance reweighting stable.

An unbounded weight can run away: it multiplies a loss, so a large one is a large learning rate for
one example, and a negative one trains on its opposite. So a raw weight, which may be any number,
goes through a bound to a weight in a stated range (``weighting.bounds``),

    weight = bound(raw weight) in [low, high],    weight = prior at the start,

and weights are divided by their mean (``weighting.normalise``), so that they choose among examples
and do not act as a second learning rate. DreamPRM-1.5 (arXiv 2509.05542) clamps a table to
[-1, 3] and puts a net's output through a sigmoid. A clamp's derivative is 0 past its ends, so a
weight that overshot would never come back; with ``--bound clip`` it does (``weighting.Clip``), and
``make_solver`` projects the parameters after every upper step.

Which weighting has which bound is decided here, from the options; ``WEIGHTINGS`` is the one place
where a new weighting is registered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from recipes.options.choices import DomainOptions, LearnedOptions, NetOptions, TableOptions
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
    Unbounded,
    Weighting,
    feature_count,
)


@dataclass(frozen=True)
class Registration:
    """A weighting that ``--weighting`` can name.

    Attributes:
        kind: Its class; a saved weighting is found by the class's name.
        row: Row of ``results.json`` that a run with it fills.
        build: From the options and the numbers of instances and domains in the training file.
    """

    kind: type[Weighting]
    row: str
    build: Callable[[TrainOptions, int, int], Weighting]


def make_bound(settings: LearnedOptions) -> Bound:
    """The bound that the options of a weighting name."""
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


def _instance_net(options: TrainOptions, instances: int, domains: int) -> InstanceNet:
    settings = options.weighting
    assert isinstance(settings, NetOptions)
    bound = make_bound(settings)
    by_batch = settings.normalise == "batch"
    _check_batches(options, settings.centre or by_batch, "--normalise none --no-centre")
    with blaming("--features"):
        features = feature_count(
            settings.features, reference=settings.reference_features, domains=domains
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


def _instance_table(options: TrainOptions, instances: int, domains: int) -> InstanceTable:
    settings = options.weighting
    assert isinstance(settings, TableOptions)
    bound = make_bound(settings)
    _check_batches(options, settings.normalise == "batch", "--normalise table")
    return InstanceTable(instances, settings.prior, bound, settings.normalise)


def _domain_table(options: TrainOptions, instances: int, domains: int) -> DomainTable:
    settings = options.weighting
    assert isinstance(settings, DomainOptions)
    bound = make_bound(settings)
    if not float(bound(torch.zeros(()))) > 0:
        raise ValueError(
            f"domain weights start at bound(0), which is 0 for --bound {settings.bound}; "
            "use softplus or sigmoid"
        )
    return DomainTable(domains, bound)


WEIGHTINGS: dict[str, Registration] = {
    "net": Registration(InstanceNet, "instance_net", _instance_net),
    "table": Registration(InstanceTable, "instance_table", _instance_table),
    "domain": Registration(DomainTable, "domain_table", _domain_table),
}
"""Every weighting that ``--weighting`` can name, beside "none"."""


def make_weighting(options: TrainOptions, instances: int, domains: int) -> Weighting | None:
    """The weighting that the options name; None for "none".

    Args:
        options: Options of the run.
        instances: Examples of the training file.
        domains: Domains of the training file; 0 if some example has none.

    Raises:
        OptionError: Options that do not go together.
    """
    if options.weighting.kind == "none":
        return None
    with blaming(f"--weighting {options.weighting.kind}"):
        return WEIGHTINGS[options.weighting.kind].build(options, instances, domains)


def _check_batches(options: TrainOptions, compared: bool, remedy: str) -> None:
    """Refuse batches of one example whose weights would be compared within the batch."""
    if options.lower.batch_size == 1 and compared:
        raise ValueError(
            "weights are compared within a micro-batch, and the only example of --batch-size 1 "
            f"always gets the same weight; use 2 or more, or {remedy}"
        )
