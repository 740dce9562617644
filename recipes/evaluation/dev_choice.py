"""Aggregation and threshold chosen on a dev set, so that the test set need not choose anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from prm.aggregations import AGGREGATIONS
from prm.evaluation.step_benchmarks import best_threshold
from prm.names import AggregationName, TieRule
from recipes.evaluation.candidates import Candidates, judged_steps, solution_scores_of


@dataclass(frozen=True)
class Choice:
    """How step scores are used.

    Attributes:
        aggregation: Step scores to solution score.
        threshold: A step whose score exceeds it is judged right.
        dev: What the choice rests on; None if it was given, not chosen.
    """

    aggregation: AggregationName
    threshold: float
    dev: Mapping[str, Any] | None = None


def choose_on_dev(candidates: Candidates, rows: Sequence[Tensor], tie: TieRule) -> Choice:
    """The aggregation of the highest best-of-N accuracy and the threshold of the highest macro F1.

    Of several best aggregations the first listed is taken, so the mean unless another beats it.
    Without both right and wrong labelled steps the threshold stays 1/2.

    Args:
        candidates: The dev set.
        rows: Step scores of every candidate, [steps] each.
        tie: Value of tied candidates.
    """
    accuracy = {
        name: float(np.mean(candidates.best(solution_scores_of(rows, how), tie)))
        for name, how in AGGREGATIONS.items()
    }
    truth, predicted = judged_steps(candidates, rows)
    threshold, figure = 0.5, None
    if truth.any() and not truth.all():
        threshold, figure = best_threshold(truth, predicted)
    return Choice(
        aggregation=max(accuracy, key=lambda name: accuracy[name]),
        threshold=threshold,
        dev={
            "file": str(candidates.data.path),
            "n_questions": len(candidates.groups),
            "accuracy": {name: round(value, 4) for name, value in accuracy.items()},
            "step_macro_f1": None if figure is None else round(figure, 4),
        },
    )
