"""The figures that ``evaluate`` reports on the step scores of a file of candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from prm.aggregations import AGGREGATIONS
from prm.data.store.examples import facts
from prm.data.store.outline import Facts
from prm.evaluation.calibration import brier, expected_calibration_error
from prm.evaluation.metrics import (
    best_of_k_curve,
    macro_f1,
    mcnemar,
    paired_interval,
    pass_at_k,
    roc_auc,
    roc_auc_interval,
)
from prm.evaluation.step_benchmarks import first_error, process_bench, visual_process_bench
from prm.names import TieRule
from recipes.evaluation.candidates import Candidates, judged_steps, solution_scores_of, summary
from recipes.evaluation.dev_choice import Choice

Values = dict[str, NDArray[np.float64]]
_UNNAMED = "no domain"


def selection_values(candidates: Candidates, scores: Tensor, row: str, tie: TieRule) -> Values:
    """Return the per-question values of every selector; the model's row is named ``row``.

    Where no question has right and wrong candidates, nothing can be selected: pass@1 is the only
    row. Rows without a single value are left out, votes if there is no answer.
    """
    if not candidates.mixed:
        return {"pass@1": candidates.pass_at_one} if candidates.groups else {}
    size = max(map(len, candidates.groups))
    values = {
        "pass@1": candidates.pass_at_one,
        "self_consistency": candidates.vote(tie=tie),
        "weighted_vote": candidates.vote(scores, tie),
        row: candidates.best(scores, tie),
        f"pass@{size}": candidates.pass_at_n,
    }
    return {name: value for name, value in values.items() if not np.isnan(value).all()}


def all_figures(
    candidates: Candidates,
    rows: Sequence[Tensor],
    choice: Choice,
    tie: TieRule,
    row: str,
    baseline: Sequence[Tensor] | None = None,
) -> dict[str, Any]:
    """Return the content of the results file of ``evaluate``.

    Of solutions that are no candidates only the figures of steps and, where ``correct`` is known,
    of solutions are there.

    Args:
        candidates: The questions.
        rows: The step scores of every candidate, [steps] each.
        choice: The aggregation and the threshold.
        tie: The rule that gives the value of tied candidates.
        row: The name of the model's row.
        baseline: The step scores of another model, which get a row with the same choice.
    """
    scores = solution_scores_of(rows, AGGREGATIONS[choice.aggregation])
    values = selection_values(candidates, scores, row, tie)
    if baseline is not None and row in values:
        theirs = solution_scores_of(baseline, AGGREGATIONS[choice.aggregation])
        values["baseline"] = candidates.best(theirs, tie)
    rivals = [name for name in ("baseline", "self_consistency", "weighted_vote") if name in values]
    steps = step_figures(candidates, rows, choice.threshold)
    return {
        **summary(values),
        "n_questions": len(candidates.groups) or len(set(candidates.questions)),
        "n_solutions": len(candidates.data),
        "n_mixed_questions": candidates.mixed if candidates.groups else None,
        "n_truncated": sum(candidates.is_truncated),
        "n_without_answer": sum(vote is None for votes in candidates.votes for vote in votes),
        "n_questions_without_vote": sum(not any(votes) for votes in candidates.votes),
        "n_contradictory_questions": candidates.contradictory,
        "n_groups_alike": candidates.groups_alike,
        "aggregation": choice.aggregation,
        "threshold": choice.threshold,
        "tie": tie,
        "dev": choice.dev,
        "difference": {name: compared(values[row], values[name]) for name in rivals},
        **curves(candidates, scores),
        "step_auc": steps["auc"],
        "step_macro_f1": steps["macro_f1"],
        "steps": steps,
        "solutions": solution_figures(candidates, scores),
    }


def compared(values: NDArray[np.float64], baseline: NDArray[np.float64]) -> dict[str, Any]:
    """Compare two selectors on the same questions: paired bootstrap and McNemar's test.

    Questions without a vote, where a value is NaN, are left out.
    """
    there = ~np.isnan(values) & ~np.isnan(baseline)
    values, baseline = values[there], baseline[there]
    test = mcnemar(values, baseline)
    return {
        "difference": _short(float(np.mean(values - baseline))),
        "ci95": [_short(end) for end in paired_interval(values, baseline)],
        "better": test.better,
        "worse": test.worse,
        "mcnemar_p": float(f"{test.p_value:.3g}"),
    }


def curves(candidates: Candidates, scores: Tensor) -> dict[str, list[float]]:
    """Return exact best-of-k and pass@k, for k up to the fewest candidates of a question."""
    if not candidates.groups:
        return {"best_of_k": [], "pass_at_k": []}
    most = min(map(len, candidates.groups))
    best, oracle = [], []
    for group in candidates.groups:
        right = candidates.correct(group)
        best.append(best_of_k_curve(scores[list(group)].tolist(), right)[:most])
        oracle.append([pass_at_k(right, k) for k in range(1, most + 1)])
    return {
        "best_of_k": [_short(value) for value in np.mean(best, axis=0)],
        "pass_at_k": [_short(value) for value in np.mean(oracle, axis=0)],
    }


def step_figures(
    candidates: Candidates, rows: Sequence[Tensor], threshold: float
) -> dict[str, Any]:
    """Return figures of step scores against labels, None if the labels do not allow one."""
    truth, predicted = judged_steps(candidates, rows)
    figures: dict[str, Any] = {"labelled": len(truth), "right": int(truth.sum())}
    figures["labelled_after_an_error"] = sum(
        sum(label is not None for label in labels[labels.index(False) + 1 :])
        for labels in map(_right_steps, facts(candidates.data.examples))
        if False in labels
    )
    both = bool(truth.any() and not truth.all())
    figures["auc"] = roc_auc(truth, predicted) if both else None
    figures["auc_ci95"] = None
    figures["macro_f1"] = macro_f1(truth, predicted > threshold) if both else None
    figures["ece"] = expected_calibration_error(predicted, truth) if len(truth) else None
    figures["brier"] = brier(predicted, truth) if len(truth) else None
    figures = {name: _short(value) for name, value in figures.items()}
    if both:
        questions = [
            question
            for example, question in zip(
                facts(candidates.data.examples), candidates.questions, strict=True
            )
            for label in example.labels
            if label is not None
        ]
        figures["auc_ci95"] = _auc_interval(truth, predicted, questions)
    figures["visual_process_bench"] = None
    if both:
        bench = visual_process_bench(truth, predicted > threshold, _domains(candidates))
        figures["visual_process_bench"] = {
            "macro_f1": _short(bench.pooled),
            "per_domain": {name: _short(value) for name, value in bench.per_source.items()},
            "mean_over_domains": _short(bench.mean),
        }
    figures["process_bench"], figures["process_bench_of_one_kind"] = _process_bench(
        candidates, rows, threshold
    )
    return figures


def solution_figures(candidates: Candidates, scores: Tensor) -> dict[str, Any]:
    """Return figures of solution scores against right answers, where ``correct`` is known."""
    examples = candidates.data.examples
    known = [row for row, example in enumerate(facts(examples)) if example.correct is not None]
    truth = np.array(candidates.correct(known))
    predicted = np.array(scores.tolist())[known]
    both = bool(truth.any() and not truth.all())
    named = candidates.questions
    questions = [named[row] for row in known]
    return {
        "auc": _short(roc_auc(truth, predicted)) if both else None,
        "auc_ci95": _auc_interval(truth, predicted, questions) if both else None,
        "ece": _short(expected_calibration_error(predicted, truth)) if known else None,
        "brier": _short(brier(predicted, truth)) if known else None,
    }


def _auc_interval(
    truth: NDArray[Any], predicted: NDArray[np.float64], questions: Sequence[Any]
) -> list[float]:
    numbers: dict[Any, int] = {}
    question = [numbers.setdefault(name, len(numbers)) for name in questions]
    return [_short(end) for end in roc_auc_interval(truth, predicted, question)]


def _right_steps(example: Facts) -> list[bool | None]:
    """Return whether each step is right (label above 1/2), None without a label."""
    return [None if label is None else label > 0.5 for label in example.labels]


def _domains(candidates: Candidates) -> list[str]:
    """Return the domain of every labelled step."""
    return [
        example.domain or _UNNAMED
        for example in facts(candidates.data.examples)
        for label in example.labels
        if label is not None
    ]


def _process_bench(
    candidates: Candidates, rows: Sequence[Tensor], threshold: float
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return ProcessBench per domain and its mean, and what there is of domains of one kind.

    The former is None if no domain has solutions with an error and without. Of a domain of one kind
    there are that kind's accuracy and number of solutions, and no F1.
    """
    by_domain: dict[str, tuple[list[int], list[int]]] = {}
    for example, scores, is_truncated in zip(
        facts(candidates.data.examples), rows, candidates.is_truncated, strict=True
    ):
        truth = first_error(_right_steps(example))
        if is_truncated and truth is not None and truth < 0:
            continue  # Its first error, if any, is among the steps without scores.
        predicted = first_error([score > threshold for score in scores.tolist()])
        if truth is not None and predicted is not None:
            labels, judgements = by_domain.setdefault(example.domain or _UNNAMED, ([], []))
            labels.append(truth)
            judgements.append(predicted)
    per_domain: dict[str, Mapping[str, Any]] = {}
    of_one_kind: dict[str, Any] = {}
    for name, (labels, judgements) in by_domain.items():
        if min(labels) < 0 <= max(labels):
            one = process_bench(labels, judgements)
            per_domain[name] = {field: _short(value) for field, value in one._asdict().items()}
        else:
            hits = sum(map(int.__eq__, labels, judgements))
            of_one_kind[name] = {
                "kind": "correct" if labels[0] < 0 else "erroneous",
                "solutions": len(labels),
                "accuracy": _short(hits / len(labels)),
            }
    if not per_domain:
        return None, of_one_kind
    mean = sum(entry["f1"] for entry in per_domain.values()) / len(per_domain)
    return {"mean_f1": _short(mean), "per_domain": per_domain}, of_one_kind


def _short(value: Any) -> Any:
    return round(float(value), 4) if isinstance(value, float | np.floating) else value
