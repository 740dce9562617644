"""Score candidates, select the best of each question, and say how sure the figures are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prm.metrics import bootstrap_interval, macro_f1, roc_auc
from prm.model import PRM
from prm.schema import DataError
from prm.scoring import aggregate, score_examples
from prm.select import best_of_n, self_consistency
from recipes.options import PrmOptions, ScoringOptions
from recipes.session import AGGREGATIONS, Examples, read_examples


@dataclass(frozen=True)
class Candidates:
    """A file of candidate solutions, tied together by question.

    Attributes:
        data: the candidates.
        groups: rows of each question, in file order.
    """

    data: Examples
    groups: tuple[tuple[int, ...], ...]

    @property
    def pass_at_one(self) -> np.ndarray:
        """Share of right candidates of each question."""
        return np.array([np.mean(self._correct(rows)) for rows in self.groups])

    @property
    def pass_at_n(self) -> np.ndarray:
        """Whether any candidate of each question is right: the oracle."""
        return np.array([np.max(self._correct(rows)) for rows in self.groups])

    @property
    def majority(self) -> np.ndarray:
        """Whether the most frequent answer is right (expected value over tied answers)."""
        examples = self.data.examples
        return np.array(
            [
                self_consistency([examples[row].answer for row in rows], self._correct(rows))
                for rows in self.groups
            ]
        )

    def best(self, scores: Tensor) -> np.ndarray:
        """Whether the best-scored candidate is right (expected value over tied candidates)."""
        return np.array(
            [best_of_n(scores[list(rows)].tolist(), self._correct(rows)) for rows in self.groups]
        )

    def _correct(self, rows: tuple[int, ...]) -> list[float]:
        examples = self.data.examples
        return [float(bool(examples[row].correct)) for row in rows]


@dataclass(frozen=True)
class Evaluation:
    """What a process reward model does on a file of candidates.

    Attributes:
        selected: whether the selected candidate is right, per question.
        step_auc: AUC of step scores against step labels; None without labels.
        step_macro_f1: macro F1 at threshold 0.5; None without labels.
    """

    selected: np.ndarray
    step_auc: float | None
    step_macro_f1: float | None


def read_candidates(prm: PRM, options: PrmOptions, path: str) -> Candidates:
    """Candidates of a JSONL file.

    Raises:
        DataError: a row without ``group``, ``answer`` or ``correct``.
    """
    data = read_examples(prm, options, path)
    groups: dict[str, list[int]] = {}
    for row, example in enumerate(data.examples):
        for name in ("group", "answer", "correct"):
            if getattr(example, name) is None:
                raise DataError(
                    file=path,
                    line=row + 1,
                    field=name,
                    expected="a value (candidates are compared within a group)",
                    found="nothing",
                    remedy=f"give every candidate the field {name}",
                )
        groups.setdefault(str(example.group), []).append(row)
    return Candidates(data, tuple(map(tuple, groups.values())))


def evaluate(
    prm: PRM, params: Mapping[str, Tensor], candidates: Candidates, options: ScoringOptions
) -> Evaluation:
    """Score every candidate and select the best of each question."""
    step_scores, mask = step_scores_of(prm, params, candidates.data, options)
    labels = torch.full_like(step_scores, float("nan"))
    for row, example in enumerate(candidates.data.examples):
        known = [float("nan") if step.label is None else step.label for step in example.steps]
        labels[row, : len(known)] = torch.tensor(known)
    scores = aggregate(step_scores, mask, AGGREGATIONS[options.aggregation])
    judged = mask & ~labels.isnan()
    truth = (labels[judged] > 0.5).numpy()
    said = step_scores[judged].numpy()
    has_both = truth.any() and not truth.all()
    return Evaluation(
        selected=candidates.best(scores),
        step_auc=float(roc_auc(truth, said)) if has_both else None,
        step_macro_f1=float(macro_f1(truth, said > 0.5)) if has_both else None,
    )


def step_scores_of(
    prm: PRM, params: Mapping[str, Tensor], data: Examples, options: ScoringOptions
) -> tuple[Tensor, Tensor]:
    """Step scores [examples, steps] (0 where there is no step) and mask [examples, steps]."""
    scored = score_examples(prm, params, data.encoded, data.collator, options.eval_batch_size)
    steps = max(len(row) for row in scored)
    scores = torch.zeros(len(scored), steps)
    mask = torch.zeros(len(scored), steps, dtype=torch.bool)
    for row, values in enumerate(scored):
        scores[row, : len(values)] = torch.as_tensor(values)
        mask[row, : len(values)] = True
    return scores, mask


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over questions."""
    low, high = bootstrap_interval(values, seed=seed)
    return float(low), float(high)


def summary(values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Means and intervals of per-question values by row name, as ``results.json`` holds them."""
    return {
        "rows": {name: round(float(np.mean(value)), 4) for name, value in values.items()},
        "ci95": {
            name: [round(end, 4) for end in interval(value)] for name, value in values.items()
        },
    }


def values_of(candidates: Candidates, found: Evaluation, row: str) -> dict[str, np.ndarray]:
    """Per-question values of every row of a results table, the model's own row named ``row``."""
    size = max(map(len, candidates.groups))
    return {
        "pass@1": candidates.pass_at_one,
        "self_consistency": candidates.majority,
        row: found.selected,
        f"pass@{size}": candidates.pass_at_n,
    }


def report_of(
    candidates: Candidates, found: Evaluation, values: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """What ``results.json`` says of one file of candidates."""
    return {
        **summary(values),
        "n_questions": len(candidates.groups),
        "step_auc": found.step_auc,
        "step_macro_f1": found.step_macro_f1,
    }
