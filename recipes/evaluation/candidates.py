"""Candidates grouped by question, what a model selects among them, and confidence intervals."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from prm.aggregations import AGGREGATIONS, Aggregation
from prm.data.questions import words_of
from prm.data.store.examples import facts
from prm.data.store.outline import Facts
from prm.evaluation.answers import SameAnswer, answer_classes
from prm.evaluation.metrics import bootstrap_interval, macro_f1, roc_auc
from prm.evaluation.select import best_of_n, self_consistency, weighted_vote
from prm.evaluation.step_benchmarks import best_threshold
from prm.models.model import PRM
from prm.names import TieRule
from prm.scoring import StepScores, aggregate
from recipes.evaluation.scoring import score_rows
from recipes.models.loading import (
    Examples,
    Fault,
    Solutions,
    read_examples,
    read_solutions,
    usable,
)
from recipes.options.base import LoaderOptions, ScoringOptions
from recipes.options.train import TrainOptions
from recipes.options.use import RelabelOptions, WeighOptions
from recipes.terminal import progress_bar


@dataclass(frozen=True)
class Candidates:
    """A file of candidate solutions, grouped by question.

    Attributes:
        data: The candidates.
        groups: The rows of each question, in the order of the file; none if the rows are solutions
            with step labels that are no candidates.
        same_answer: A second opinion on answers of different form, or None.
    """

    data: Examples | Solutions
    groups: tuple[tuple[int, ...], ...]
    same_answer: SameAnswer | None = field(default=None, compare=False)

    @cached_property
    def votes(self) -> list[list[str | None]]:
        """The answer that each candidate of each question votes for, None without an answer.

        ``prm.evaluation.answers.answer_classes`` decides which answers are equal.
        """
        answers = [one.answer for one in facts(self.data.examples)]
        return [
            answer_classes([answers[row] for row in rows], self.same_answer) for rows in self.groups
        ]

    @property
    def is_truncated(self) -> list[bool]:
        """Whether each row has the first steps alone of its solution."""
        return [steps > kept for steps, kept in self._steps]

    @property
    def all_steps(self) -> list[int]:
        """The number of steps of the solution of each row, also of those that were cut off."""
        return [steps for steps, _ in self._steps]

    @property
    def _steps(self) -> Iterator[tuple[int, int]]:
        """The number of steps of each solution, and how many of them are kept."""
        data = self.data
        truncated = {(row.line, row.id): row.steps for row in data.bad.truncated}
        for line, row in zip(data.lines, data.facts, strict=True):
            kept = len(row.labels)
            yield truncated.get((line, row.id), kept), kept

    @property
    def mixed(self) -> int:
        """The number of questions with right and with wrong candidates."""
        return int(sum(0 < share < 1 for share in self.pass_at_one))

    @property
    def contradictory(self) -> int:
        """The number of questions with one answer that is right here and wrong there."""
        count = 0
        for rows, votes in zip(self.groups, self.votes, strict=True):
            outcomes = {pair for pair in zip(votes, self.correct(rows), strict=True) if pair[0]}
            count += len(outcomes) > len({vote for vote, _ in outcomes})
        return count

    @property
    def groups_alike(self) -> int:
        """The number of groups whose name is another one's but for case, white space and such."""
        if not self.groups:
            return 0
        names = {str(one.group) for one in self.data.facts}
        return len(names) - len({tuple(words_of(name)) for name in names})

    @cached_property
    def questions(self) -> list[int]:
        """The number of each row's question: its group or, without one, its text and images."""
        numbers: dict[Any, int] = {}
        if all(one.group for one in facts(self.data.examples)):  # then nothing is read again
            names: Iterable[Any] = ((one.group,) for one in facts(self.data.examples))
        else:
            names = (
                (one.group,) if one.group else (one.question, *one.images)
                for one in self.data.examples
            )
        return [numbers.setdefault(name, len(numbers)) for name in names]

    @cached_property
    def _right(self) -> Sequence[int]:
        """1 for each row whose answer is right, else 0."""
        return array("b", (bool(one.correct) for one in facts(self.data.examples)))

    @property
    def pass_at_one(self) -> np.ndarray:
        """The share of right candidates of each question."""
        return np.array([np.mean(self.correct(rows)) for rows in self.groups])

    @property
    def pass_at_n(self) -> np.ndarray:
        """Whether any candidate of each question is right (the oracle)."""
        return np.array([np.max(self.correct(rows)) for rows in self.groups])

    @property
    def majority(self) -> np.ndarray:
        """Whether the most frequent answer is right, the expected value over tied answers."""
        return self.vote()

    def vote(self, scores: Tensor | None = None, tie: TieRule = "expected") -> np.ndarray:
        """Return whether the answer with the most votes is right; ``scores`` weight the votes.

        A question whose candidates all have no answer has no vote, and the value NaN.
        """
        values = []
        for rows, answers in zip(self.groups, self.votes, strict=True):
            correct = self.correct(rows)
            if not any(answers):
                values.append(float("nan"))
            elif scores is None:
                values.append(self_consistency(answers, correct, tie=tie))
            else:
                weights = scores[list(rows)].tolist()
                values.append(weighted_vote(answers, weights, correct, tie=tie))
        return np.array(values)

    def best(self, scores: Tensor, tie: TieRule = "expected") -> np.ndarray:
        """Return whether the candidate with the best score is right; ``tie`` resolves ties."""
        return np.array(
            [
                best_of_n(scores[list(rows)].tolist(), self.correct(rows), tie=tie)
                for rows in self.groups
            ]
        )

    def correct(self, rows: Sequence[int]) -> list[float]:
        """Return 1 for each row whose answer is right, else 0."""
        return [float(self._right[row]) for row in rows]


@dataclass(frozen=True)
class Evaluation:
    """The results of a process reward model on a file of candidates.

    Attributes:
        selected: Whether the selected candidate is right, per question.
        step_auc: The AUC of step scores against step labels, None without labels of both kinds.
        step_macro_f1: The macro F1 at threshold 0.5, None without labels of both kinds.
        threshold: The threshold of the best macro F1, None without labels of both kinds.
        scores: The score of every solution, [solutions].
    """

    selected: np.ndarray
    step_auc: float | None
    step_macro_f1: float | None
    threshold: float | None
    scores: Tensor


def read_candidates(prm: PRM, options: LoaderOptions, path: str) -> Candidates:
    """Read the candidates of a file, and tokenise them for ``prm``.

    Raises:
        OptionError: There is no such file.
        DataError: A row has no ``group`` or ``correct``.
    """
    return tie_together(read_examples(prm, options, path))


def read_scored_candidates(options: LoaderOptions, path: str) -> Candidates:
    """Read candidates that are scored already; raises the errors of ``read_candidates``."""
    return tie_together(read_solutions(options, path))


def tie_together(data: Examples | Solutions) -> Candidates:
    """Group candidates into questions by their ``group``.

    Raises:
        DataError: A row has no ``group`` or ``correct``.
    """
    data = usable(data, _lacks)
    groups: dict[str, list[int]] = {}
    for row, example in enumerate(data.facts):
        groups.setdefault(str(example.group), []).append(row)
    return Candidates(data, tuple(map(tuple, groups.values())))


def _lacks(example: Facts) -> Fault | None:
    for name in ("group", "correct"):
        if getattr(example, name) is None:
            return Fault(
                field=name,
                expected="a value (candidates are compared within a group)",
                found="nothing",
                remedy=f"give every candidate the field {name}",
            )
    return None


def candidates_or_steps(data: Examples | Solutions) -> Candidates:
    """Group candidates, or return rows with step labels that are no candidates without groups.

    Rows are no candidates if none of them has both ``group`` and ``correct``, as in ProcessBench
    and VisualProcessBench.

    Raises:
        DataError: A row has no ``group`` or ``correct``, and others have both or no step a label.
    """
    if any(row.group is not None and row.correct is not None for row in data.facts):
        return tie_together(data)
    if any(row.labelled for row in data.facts):
        return Candidates(data, ())
    return tie_together(data)


def evaluate(
    prm: PRM, params: Mapping[str, Tensor], candidates: Candidates, options: TrainOptions
) -> Evaluation:
    """Score every candidate and select the best of each question."""
    data = cast(Examples, candidates.data)
    full_vocab = options.probability == "vocabulary"
    scores, mask = step_scores_of(prm, params, data, options, full_vocab=full_vocab)
    rows = [steps[there] for steps, there in zip(scores, mask, strict=True)]
    truth, predicted = judged_steps(candidates, rows)
    has_both = truth.any() and not truth.all()
    solutions = solution_scores_of(rows, AGGREGATIONS[options.aggregation])
    return Evaluation(
        selected=candidates.best(solutions),
        step_auc=float(roc_auc(truth, predicted)) if has_both else None,
        step_macro_f1=float(macro_f1(truth, predicted > 0.5)) if has_both else None,
        threshold=best_threshold(truth, predicted)[0] if has_both else None,
        scores=solutions,
    )


def solution_scores_of(rows: Sequence[Tensor], how: Aggregation) -> Tensor:
    """Return the score of every solution, [solutions], from its step scores, [steps] each.

    Solutions are aggregated one by one, so that the last bits, and so ties, do not depend on the
    other solutions.
    """
    scores = torch.empty(len(rows), dtype=rows[0].dtype)
    for number, row in enumerate(rows):
        scores[number] = aggregate(row, torch.ones_like(row, dtype=torch.bool), how)
    return scores


def judged_steps(candidates: Candidates, rows: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Return whether each labelled step is right (label above 1/2), and its score."""
    truth, predicted = array("b"), array("d")
    for example, scores in zip(facts(candidates.data.examples), rows, strict=True):
        for label, score in zip(example.labels, scores.tolist(), strict=True):
            if label is not None:
                truth.append(label > 0.5)
                predicted.append(score)
    return np.array(truth, dtype=bool), np.array(predicted)


def step_scores_of(
    prm: PRM,
    params: Mapping[str, Tensor],
    data: Examples,
    options: ScoringOptions | WeighOptions | RelabelOptions,
    *,
    full_vocab: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return step scores (0 without a step) and the mask of steps, [examples, steps] each."""
    shown = not isinstance(options, TrainOptions) or options.run.progress
    scored = scores_of(prm, params, data, options, full_vocab=full_vocab, shown=shown)
    steps = max(len(row) for row in scored)
    scores = torch.zeros(len(scored), steps)
    mask = torch.zeros(len(scored), steps, dtype=torch.bool)
    for row, values in enumerate(scored):
        scores[row, : len(values)] = values
        mask[row, : len(values)] = True
    return scores, mask


def scores_of(
    prm: PRM,
    params: Mapping[str, Tensor],
    data: Examples,
    options: ScoringOptions | WeighOptions | RelabelOptions,
    *,
    full_vocab: bool = False,
    shown: bool = True,
) -> StepScores:
    """Return the step scores of every example, [steps] each, with a progress bar if ``shown``."""
    with progress_bar("scoring", len(data), shown=shown) as bar:
        return score_rows(
            prm,
            params,
            data.encoded,
            data.collator,
            options.eval_batch_size,
            bar,
            full_vocab=full_vocab,
            workers=options.workers,
            tokens_per_batch=options.tokens_per_batch,
        )


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean over questions."""
    low, high = bootstrap_interval(values, seed=seed)
    return float(low), float(high)


def summary(values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return means and intervals of per-question values by row, as in ``results.json``.

    Values that are NaN are left out, and so is a row that has no others.
    """
    there = {name: value[~np.isnan(value)] for name, value in values.items()}
    there = {name: value for name, value in there.items() if len(value)}
    return {
        "rows": {name: round(float(np.mean(value)), 4) for name, value in there.items()},
        "ci95": {name: [round(end, 4) for end in interval(value)] for name, value in there.items()},
    }


def values_of(candidates: Candidates, evaluation: Evaluation, row: str) -> dict[str, np.ndarray]:
    """Return the per-question values of every row; the row of the model is named ``row``."""
    size = max(map(len, candidates.groups))
    return {
        "pass@1": candidates.pass_at_one,
        "self_consistency": candidates.majority,
        row: evaluation.selected,
        f"pass@{size}": candidates.pass_at_n,
    }


def report_of(
    candidates: Candidates, evaluation: Evaluation, values: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Return the entries of ``results.json`` on a file of candidates."""
    truncated = sum(candidates.is_truncated)
    return {
        **summary(values),
        "n_questions": len(candidates.groups),
        **({"n_truncated": truncated} if truncated else {}),
        "step_auc": evaluation.step_auc,
        "step_macro_f1": evaluation.step_macro_f1,
    }
