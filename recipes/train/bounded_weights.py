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

from recipes.options.refusal import blaming
from recipes.options.train import TrainOptions
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


def make_bound(options: TrainOptions) -> Bound:
    """The bound that the options name."""
    bounds: dict[str, Callable[[], Bound]] = {
        "clip": lambda: Clip(options.bound_low, options.bound_high),
        "clamp": lambda: Clip(options.bound_low, options.bound_high, recover=False),
        "sigmoid": lambda: Sigmoid(options.bound_high),
        "softplus": Softplus,
        "leaky-relu": LeakyReLU,
        "relu": lambda: LeakyReLU(0.0),
        "none": Unbounded,
    }
    return bounds[options.bound]()


def _instance_net(options: TrainOptions, instances: int, domains: int) -> InstanceNet:
    bound = make_bound(options)
    _check_batches(
        options, options.centre or options.normalise == "batch", "--normalise none --no-centre"
    )
    with blaming("--features"):
        features = feature_count(
            options.features, reference=options.reference_features, domains=domains
        )
    return InstanceNet(
        features,
        options.hidden,
        options.layers,
        options.prior,
        bound,
        centre=options.centre,
        normalise=options.normalise == "batch",
    )


def _instance_table(options: TrainOptions, instances: int, domains: int) -> InstanceTable:
    bound = make_bound(options)
    _check_batches(options, options.normalise == "batch", "--normalise table")
    return InstanceTable(instances, options.prior, bound, options.normalise)


def _domain_table(options: TrainOptions, instances: int, domains: int) -> DomainTable:
    bound = make_bound(options)
    if not float(bound(torch.zeros(()))) > 0:
        raise ValueError(
            f"domain weights start at bound(0), which is 0 for --bound {options.bound}; "
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
    if options.weighting == "none":
        return None
    with blaming(f"--weighting {options.weighting}"):
        return WEIGHTINGS[options.weighting].build(options, instances, domains)


def _check_batches(options: TrainOptions, compared: bool, remedy: str) -> None:
    """Refuse batches of one example whose weights would be compared within the batch."""
    if options.batch_size == 1 and compared:
        raise ValueError(
            "weights are compared within a micro-batch, and the only example of --batch-size 1 "
            f"always gets the same weight; use 2 or more, or {remedy}"
        )
