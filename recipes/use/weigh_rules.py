"""Weights by a rule instead of a learned weighting: a given share of the examples is kept.

``train --weighting none --weights-file`` reads the weights file, as a baseline for learned weights
at the same share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.evaluation.candidates import step_scores_of
from recipes.models.loading import (
    Examples,
    Solutions,
    load_model,
    placement_of,
    read_examples,
    read_solutions,
)
from recipes.options.use import WeighOptions
from recipes.options.values import OptionError
from recipes.train.data import require
from recipes.train.reports.weights import initial_losses, step_labels
from weighting import balanced_information, keep_best


def rule_weights(options: WeighOptions) -> tuple[Examples | Solutions, Tensor, Tensor]:
    """Return examples, weights (1 kept, 0 not) and the scores that rank the examples.

    ``bis`` ranks by the Balanced-Information Score of the step labels
    (``weighting.balanced_information``). ``small-loss`` ranks by minus the loss under ``--model``:
    examples with a large loss after a short training are assumed to be mislabelled. ``random`` is a
    seeded draw.

    Raises:
        OptionError: The share or alpha is outside its range.
        DataError: An example has no labelled step, or no domain if examples are ranked within
            domains.
    """
    data: Examples | Solutions
    if options.by == "small-loss":
        prm, params = load_model(options, placement=placement_of(options.placement))
        data = require(read_examples(prm, options, options.file), "labels")
        if options.within == "domain":
            data = require(data, "domain")
        scores = -initial_losses(*step_scores_of(prm, params, data, options), data)
    else:
        data = read_solutions(options, options.file)
        if options.by == "bis":
            data = require(data, "labels")
        if options.within == "domain":
            data = require(data, "domain")
        scores = _bis(options, data) if options.by == "bis" else _draw(options, len(data))
    groups = None
    if options.within == "domain":
        groups = [example.domain for example in data.facts]
    try:
        return data, keep_best(scores, options.keep, groups), scores
    except ValueError as error:
        raise OptionError(f"--keep {options.keep}: {error}") from error


def _bis(options: WeighOptions, data: Solutions) -> Tensor:
    labels = step_labels(data.examples, max(len(example.labels) for example in data.facts))
    try:
        return balanced_information(labels, ~labels.isnan(), alpha=options.alpha)
    except ValueError as error:
        raise OptionError(f"--alpha {options.alpha}: {error}") from error


def _draw(options: WeighOptions, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(options.seed))
