"""Choose aggregation and threshold on a dev set, so that nothing is tuned on the test set."""

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
        aggregation: The map from step scores to a solution score.
        threshold: The score above which a step is judged right.
        dev: The figures on the dev set, None if nothing was chosen there.
    """

    aggregation: AggregationName
    threshold: float
    dev: Mapping[str, Any] | None = None


def choose_on_dev(candidates: Candidates, rows: Sequence[Tensor], tie: TieRule) -> Choice:
    """Choose the aggregation by best-of-N accuracy and the threshold by macro F1.

    Of several best aggregations the first in the list is chosen, so the mean unless another is
    better. Without both right and wrong labelled steps the threshold is 1/2. Rows that are no
    candidates choose the threshold alone.

    Args:
        candidates: The dev set.
        rows: The step scores of every candidate, [steps] each.
        tie: The rule that gives the value of tied candidates.
    """
    accuracy = {
        name: float(np.mean(candidates.best(solution_scores_of(rows, how), tie)))
        for name, how in AGGREGATIONS.items()
        if candidates.groups
    }
    truth, predicted = judged_steps(candidates, rows)
    threshold, figure = 0.5, None
    if truth.any() and not truth.all():
        threshold, figure = best_threshold(truth, predicted)
    return Choice(
        aggregation=max(accuracy, key=lambda name: accuracy[name], default="mean"),
        threshold=threshold,
        dev={
            "file": str(candidates.data.path),
            "n_questions": len(candidates.groups),
            "accuracy": {name: round(value, 4) for name, value in accuracy.items()},
            "step_macro_f1": None if figure is None else round(figure, 4),
        },
    )
