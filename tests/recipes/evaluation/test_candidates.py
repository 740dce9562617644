"""From step scores to the rows of a table, on candidates whose scores are given."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import recipes.evaluation.candidates
from prm.schema import DataError, Step, StepExample
from prm.scoring import score_examples
from recipes.evaluation.candidates import (
    Candidates,
    evaluate,
    interval,
    read_candidates,
    step_scores_of,
    summary,
)
from recipes.models.loading import load_model
from recipes.train.reports.weights import label_correlation, weight_report
from recipes.train.results import print_summary
from tests.tiny_task import altered

# question, answer, right, (label, score) of each step
CANDIDATES = [
    ("q1", "3", False, [(1, 0.9), (0, 0.6)]),
    ("q1", "5", True, [(1, 0.7), (1, 0.9)]),
    ("q2", "8", True, [(1, 0.5)]),
    ("q1", "3", False, [(0, 0.2), (None, 0.9), (1, 0.4)]),
    ("q2", "9", False, [(0, 0.5)]),
]


@pytest.fixture
def candidates():
    examples = [
        StepExample(
            id=str(number),
            question="?",
            images=(),
            steps=tuple(Step("a", label) for label, _ in steps),
            answer=answer,
            correct=right,
            group=question,
        )
        for number, (question, answer, right, steps) in enumerate(CANDIDATES)
    ]
    return Candidates(SimpleNamespace(examples=examples), ((0, 1, 3), (2, 4)))


@pytest.fixture
def scored(monkeypatch):
    def given(prm, params, data, options, full_vocab=False):
        scores, mask = torch.zeros(5, 3), torch.zeros(5, 3, dtype=torch.bool)
        for row, (*_, steps) in enumerate(CANDIDATES):
            scores[row, : len(steps)] = torch.tensor([score for _, score in steps])
            mask[row, : len(steps)] = True
        return scores, mask

    monkeypatch.setattr(recipes.evaluation.candidates, "step_scores_of", given)


def test_rows_that_need_no_model(candidates):
    assert candidates.pass_at_one.tolist() == pytest.approx([1 / 3, 1 / 2])
    assert candidates.pass_at_n.tolist() == [1.0, 1.0]
    # Two wrong "3" beat one right "5"; one vote each is a draw.
    assert candidates.majority.tolist() == [0.0, 0.5]


def test_best_shares_ties(candidates):
    assert candidates.best(torch.tensor([0.1, 0.2, 0.5, 0.3, 0.5])).tolist() == [0.0, 0.5]
    assert candidates.best(torch.tensor([0.1, 0.9, 0.6, 0.3, 0.5])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("aggregation", "first"),
    [
        ("mean", 1.0),  # 0.75, 0.8, 0.5
        ("min", 1.0),  # 0.6, 0.7, 0.2
        ("max", 1 / 3),  # 0.9 three times
        ("last", 1.0),  # 0.6, 0.9, 0.4
        ("product", 1.0),  # 0.54, 0.63, 0.072
    ],
)
def test_selection_by_aggregated_scores(candidates, scored, aggregation, first):
    found = evaluate(
        None, {}, candidates, SimpleNamespace(aggregation=aggregation, probability="labels")
    )
    assert found.selected.tolist() == pytest.approx([first, 0.5])


def test_step_metrics_leave_out_steps_without_label(candidates, scored):
    found = evaluate(
        None, {}, candidates, SimpleNamespace(aggregation="mean", probability="labels")
    )
    # Right steps: 0.9 0.7 0.9 0.5 0.4. Wrong: 0.6 0.2 0.5. Pairs won: 3+3+3+1.5+1 of 15.
    assert found.step_auc == pytest.approx(11.5 / 15)
    # Above 0.5: three of five right ones, one of three wrong ones.
    f1_right, f1_wrong = 2 * 3 / (2 * 3 + 1 + 2), 2 * 2 / (2 * 2 + 2 + 1)
    assert found.step_macro_f1 == pytest.approx((f1_right + f1_wrong) / 2)


def test_step_metrics_need_both_kinds(candidates, scored):
    examples = [
        StepExample(e.id, e.question, (), tuple(Step("a", 1.0) for _ in e.steps))
        for e in candidates.data.examples
    ]
    same = Candidates(SimpleNamespace(examples=examples), candidates.groups)
    found = evaluate(None, {}, same, SimpleNamespace(aggregation="mean", probability="labels"))
    assert found.step_auc is None
    assert found.step_macro_f1 is None


def test_summary_rounds_means_and_intervals():
    report = summary({"prm": np.array([1.0, 0.0, 0.0]), "pass@2": np.ones(3)})
    assert report["rows"] == {"prm": 0.3333, "pass@2": 1.0}
    assert report["ci95"] == {"prm": [0.0, 1.0], "pass@2": [1.0, 1.0]}
    assert interval(np.full(7, 0.25)) == (0.25, 0.25)


def test_candidates_are_tied_by_group_in_file_order(task, tmp_path):
    options = task.train(tmp_path)
    prm, params = load_model(options)
    mixed = altered(
        task.data / "test.jsonl",
        tmp_path / "mixed.jsonl",
        lambda n, row: row | {"group": "ba"[n % 2]},
    )
    candidates = read_candidates(prm, options, str(mixed))
    assert candidates.groups == (tuple(range(0, 20, 2)), tuple(range(1, 20, 2)))
    scores, mask = step_scores_of(prm, params, candidates.data, options)
    data = candidates.data
    alone = score_examples(prm, params, data.encoded[7:8], data.collator, 1)[0]
    torch.testing.assert_close(scores[7][mask[7]], alone)
    assert not scores[~mask].any()


@pytest.mark.parametrize("name", ["group", "correct"])
def test_candidates_need_their_fields(task, tmp_path, name):
    options = task.train(tmp_path)
    prm, _ = load_model(options)

    def lose(place, row):
        return {key: value for key, value in row.items() if key != name or place != 3}

    broken = altered(task.data / "test.jsonl", tmp_path / "broken.jsonl", lose)
    with pytest.raises(DataError, match=rf":4: field {name}: expected .*found nothing; give every"):
        read_candidates(prm, options, str(broken))


def test_a_candidate_without_an_answer_is_read_and_does_not_vote(task, tmp_path):
    options = task.train(tmp_path)
    prm, _ = load_model(options)

    def lose(place, row):
        return {key: value for key, value in row.items() if key != "answer" or place != 3}

    fewer = altered(task.data / "test.jsonl", tmp_path / "fewer.jsonl", lose)
    votes = read_candidates(prm, options, str(fewer)).votes
    assert sum(vote is None for question in votes for vote in question) == 1


def test_a_row_without_values_is_left_out_of_a_summary():
    nan = float("nan")
    report = summary({"vote": np.array([nan, 1.0, 0.0]), "none": np.array([nan, nan, nan])})
    assert report["rows"] == {"vote": 0.5}


def weighted(*rows):
    examples = [
        SimpleNamespace(extra={"source": source, "wrong_labels": wrong})
        for source, wrong, _ in rows
    ]
    return SimpleNamespace(examples=examples), torch.tensor([weight for *_, weight in rows])


def test_weight_report_compares_wrong_examples_of_a_source_with_all_clean_ones():
    report = weight_report(
        *weighted(
            ("good", 0, 1.5), ("good", 0, 1.0), ("bad", 2, 0.5), ("bad", 1, 1.25), ("bad", 0, 1.0),
            ("worse", 3, 2.0),
        )
    )  # fmt: skip
    assert report["sources"] == {
        "good": {"mean_weight": 1.25},
        "bad": {"mean_weight": 0.9167, "auc": 0.6667},  # 1.5 beats both, 1.0 twice one of two
        "worse": {"mean_weight": 2.0, "auc": 0.0},
    }
    assert report["weight_auc"] == 0.4444


def test_weight_report_without_clean_or_without_wrong_examples():
    assert weight_report(*weighted(("a", 0, 1.0), ("b", 0, 1.0)))["sources"] == {
        "a": {"mean_weight": 1.0},
        "b": {"mean_weight": 1.0},
    }
    report = weight_report(*weighted(("a", 1, 0.5), ("b", 2, 1.5)))
    assert report == {"sources": {"a": {"mean_weight": 0.5}, "b": {"mean_weight": 1.5}}}


def test_weight_report_needs_data_that_says_who_judged():
    data = SimpleNamespace(examples=[SimpleNamespace(extra={"source": "a"})])
    assert weight_report(data, torch.ones(1)) == {}


def labelled(*rows):
    examples = [
        StepExample(str(row), "q", (), tuple(Step("s", label) for label in labels))
        for row, labels in enumerate(rows)
    ]
    return SimpleNamespace(examples=examples)


def test_label_correlation_is_that_of_the_share_of_right_labels():
    data = labelled([1.0, 1.0], [1.0, 0.0], [0.0, None], [None, None])
    assert label_correlation(data, torch.tensor([1.5, 1.0, 0.5, 9.0])) == 1.0
    assert label_correlation(data, torch.tensor([0.5, 1.0, 1.5, 9.0])) == -1.0
    assert label_correlation(data, torch.tensor([1.0, 0.5, 1.5, 9.0])) == -0.5
    assert label_correlation(data, torch.ones(4)) is None
    assert label_correlation(labelled([1.0], [1.0]), torch.tensor([1.0, 2.0])) is None


@pytest.mark.parametrize(("correlation", "warned"), [(0.31, False), (-0.85, True), (None, False)])
def test_the_summary_says_whether_labels_explain_the_weights(correlation, warned, capsys, tmp_path):
    results = {"rows": {}, "troubles": {}, "seconds": {"train": 1.0}}
    print_summary(results | {"weight_label_correlation": correlation}, tmp_path)
    shown = capsys.readouterr().out
    assert ("share of + labels" in shown) == (correlation is not None)
    assert ("warning: the labels alone" in shown) == warned
