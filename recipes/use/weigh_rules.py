"""Weights by a rule instead of a learned weighting: which share of the examples is kept.

The weights file goes to ``train --weighting none --weights-file``, as what learned weights are
compared with at the same share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.evaluation.candidates import step_scores_of
from recipes.loading import Examples, Solutions, load_model, read_examples, read_solutions
from recipes.options.use import WeighOptions
from recipes.options.values import OptionError
from recipes.train.data import require
from recipes.train.weight_report import initial_losses, step_labels
from weighting import balanced_information, keep_best


def rule_weights(options: WeighOptions) -> tuple[Examples | Solutions, Tensor, Tensor]:
    """Examples, weights (1 kept, 0 not) and the scores that ranked them.

    ``bis``: Balanced-Information Score of the step labels (``weighting.balanced_information``).
    ``small-loss``: minus the loss under ``--model``; examples that a model trained for a short
    while finds hard are taken to be mislabelled. ``random``: a seeded draw.

    Raises:
        OptionError: A share or an alpha outside its range.
        DataError: An example without a labelled step, or without a domain where examples are ranked
            within domains.
    """
    data: Examples | Solutions
    if options.by == "small-loss":
        prm, params = load_model(options)
        data = read_examples(prm, options, options.file)
        require(data, "labels")
        scores = -initial_losses(*step_scores_of(prm, params, data, options), data)
    else:
        data = read_solutions(options, options.file)
        scores = _bis(options, data) if options.by == "bis" else _draw(options, len(data))
    groups = None
    if options.within == "domain":
        require(data, "domain")
        groups = [example.domain for example in data.examples]
    try:
        return data, keep_best(scores, options.keep, groups), scores
    except ValueError as error:
        raise OptionError(f"--keep {options.keep}: {error}") from error


def _bis(options: WeighOptions, data: Solutions) -> Tensor:
    require(data, "labels")
    labels = step_labels(data.examples, max(len(example.steps) for example in data.examples))
    try:
        return balanced_information(labels, ~labels.isnan(), alpha=options.alpha)
    except ValueError as error:
        raise OptionError(f"--alpha {options.alpha}: {error}") from error


def _draw(options: WeighOptions, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(options.seed))
