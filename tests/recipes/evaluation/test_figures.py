"""Every figure of ``evaluate`` by hand, on candidates whose scores are given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prm.schema import DataError, Step, StepExample
from recipes.evaluation.candidates import Candidates, candidates_or_steps, tie_together
from recipes.evaluation.dev_choice import Choice, choose_on_dev
from recipes.evaluation.figures import all_figures
from recipes.models.loading import Solutions

# question, domain, answer, right, (label, score) of each step
ROWS = [
    ("q1", "sum", "3", False, [(1, 0.9), (0, 0.6)]),
    ("q1", "sum", "5 cm", True, [(1, 0.7), (1, 0.9)]),
    ("q1", "sum", r"\boxed{5}", True, [(1, 0.6), (None, 0.1)]),
    ("q2", "gap", "(b)", True, [(1, 0.5)]),
    ("q2", "gap", "C", False, [(0, 0.25)]),
    ("q2", "gap", "B", True, [(1, 0.4), (1, 0.8)]),
]


def candidates(rows=ROWS) -> tuple[Candidates, list[torch.Tensor]]:
    examples = [
        StepExample(
            id=str(number),
            question="?",
            images=(),
            steps=tuple(Step("a", None if label is None else float(label)) for label, _ in steps),
            domain=domain,
            answer=answer,
            correct=right,
            group=question,
        )
        for number, (question, domain, answer, right, steps) in enumerate(rows)
    ]
    scores = [torch.tensor([score for _, score in steps]) for *_, steps in rows]
    return tie_together(Solutions(Path("file.jsonl"), examples)), scores


@pytest.fixture(scope="module")
def found():
    return all_figures(*candidates(), Choice("mean", 0.5), "expected", "prm")


def test_rows(found):
    # Means .75 .8 .35 and .5 .25 .6. Votes: "5 cm" and "5" are one answer, "(b)" and "B" too.
    assert found["rows"] == {
        "pass@1": pytest.approx(2 / 3, abs=1e-4),
        "self_consistency": 1.0,
        "weighted_vote": 1.0,
        "prm": 1.0,
        "pass@3": 1.0,
    }
    assert set(found["ci95"]) == set(found["rows"])
    assert found["n_questions"] == 2


def test_curves(found):
    # q1, best first: right wrong right; q2: right right wrong. k = 2: 1 - (pairs without the best).
    assert found["best_of_k"] == pytest.approx([2 / 3, (2 / 3 + 1) / 2, 1.0], abs=1e-4)
    assert found["pass_at_k"] == pytest.approx([2 / 3, 1.0, 1.0], abs=1e-4)


def test_differences(found):
    assert found["difference"]["self_consistency"] == {
        "difference": 0.0, "ci95": [0.0, 0.0], "better": 0, "worse": 0, "mcnemar_p": 1.0
    }  # fmt: skip


def test_steps(found):
    steps = found["steps"]
    # Right: .9 .7 .9 .6 .5 .4 .8. Wrong: .6 .25. Pairs won: 4.5 + 7 of 14.
    assert (steps["labelled"], steps["right"]) == (9, 7)
    assert steps["auc"] == found["step_auc"] == pytest.approx(11.5 / 14, abs=1e-4)
    # Above .5: five of seven right ones, one of two wrong ones.
    f1_right, f1_wrong = 2 * 5 / (2 * 5 + 1 + 2), 2 * 1 / (2 * 1 + 2 + 1)
    macro = (f1_right + f1_wrong) / 2
    assert steps["macro_f1"] == found["step_macro_f1"] == pytest.approx(macro, abs=1e-4)
    said = [0.9, 0.6, 0.7, 0.9, 0.6, 0.5, 0.25, 0.4, 0.8]
    truth = [1, 0, 1, 1, 1, 1, 0, 1, 1]
    squares = sum((p - y) ** 2 for p, y in zip(said, truth, strict=True))
    assert steps["brier"] == pytest.approx(squares / 9, abs=1e-4)
    # Bins of width .1; in float32 .4 .6 .8 lie just above an edge and .7 .9 just below: .25 alone,
    # .4 with .5, .6 .6 with .7, .8 with .9 .9.
    assert steps["ece"] == pytest.approx((0.25 + 1.1 + abs(1.9 - 2) + 0.4) / 9, abs=1e-4)


def test_step_benchmarks(found):
    visual = found["steps"]["visual_process_bench"]
    # sum: 4 right above, 1 wrong above. gap: 1 of 3 right above, the wrong one below.
    in_sum = (2 * 4 / (2 * 4 + 1) + 0) / 2
    in_gap = (2 / (2 + 2) + 2 / (2 + 2)) / 2
    assert visual["per_domain"] == pytest.approx({"sum": in_sum, "gap": in_gap}, abs=1e-4)
    assert visual["mean_over_domains"] == pytest.approx((in_sum + in_gap) / 2, abs=1e-4)
    assert visual["macro_f1"] == found["step_macro_f1"]
    process = found["steps"]["process_bench"]
    # sum: the error (second step) is missed, the known right one found; the third is unknown.
    assert process["per_domain"]["sum"] == {
        "f1": 0.0, "accuracy_erroneous": 0.0, "accuracy_correct": 1.0, "erroneous": 1, "correct": 1
    }  # fmt: skip
    # gap: the error is found; .5 and .4 do not exceed the threshold.
    assert process["per_domain"]["gap"] == {
        "f1": 0.0, "accuracy_erroneous": 1.0, "accuracy_correct": 0.0, "erroneous": 1, "correct": 2
    }  # fmt: skip
    assert process["mean_f1"] == 0.0


def test_a_solution_cut_before_its_first_error_has_no_part_in_processbench():
    """Of q2 the solution whose only labelled step is right; its second one was cut off."""
    rows = [*ROWS, ("q2", "gap", "B", True, [(1, 0.9)])]
    whole, scores = candidates(rows)
    figures = all_figures(whole, scores, Choice("mean", 0.5), "expected", "prm")
    assert figures["steps"]["process_bench"]["per_domain"]["gap"]["correct"] == 3
    assert figures["n_truncated"] == 0
    whole.data.bad.truncate(7, "6", 2, 1)
    assert (whole.all_steps[-1], whole.is_truncated) == (2, [False] * 6 + [True])
    figures = all_figures(whole, scores, Choice("mean", 0.5), "expected", "prm")
    assert figures["steps"]["process_bench"]["per_domain"]["gap"]["correct"] == 2
    assert figures["n_truncated"] == 1
    whole.data.bad.truncate(5, "4", 9, 1)  # its first error is among the steps that are kept
    figures = all_figures(whole, scores, Choice("mean", 0.5), "expected", "prm")
    assert figures["steps"]["process_bench"]["per_domain"]["gap"]["erroneous"] == 1


def test_solutions(found):
    # Right: .8 .35 .5 .6. Wrong: .75 .25. Pairs won: 1 + 4 of 8.
    assert found["solutions"]["auc"] == pytest.approx(5 / 8, abs=1e-4)
    squares = [0.75, 0.2, 0.65, 0.5, 0.25, 0.4]
    assert found["solutions"]["brier"] == pytest.approx(sum(v * v for v in squares) / 6, abs=1e-4)


def test_another_choice_is_used():
    found = all_figures(*candidates(), Choice("max", 0.3), "first", "prm")
    # Largest scores: .9 .9 .6 and .5 .25 .8; the first of the tied is wrong.
    assert found["rows"]["prm"] == 0.5
    assert found["steps"]["process_bench"]["per_domain"]["gap"]["f1"] == 1.0
    assert all_figures(*candidates(), Choice("max", 0.3), "last", "prm")["rows"]["prm"] == 1.0


def test_another_model_is_compared():
    questions, rows = candidates()
    worse = [1 - row for row in rows]
    found = all_figures(questions, rows, Choice("mean", 0.5), "expected", "prm", worse)
    # Theirs .25 .2 .65 and .5 .75 .4: right on q1, wrong on q2.
    assert found["rows"]["baseline"] == 0.5
    entry = found["difference"]["baseline"]
    assert (entry["difference"], entry["better"], entry["worse"]) == (0.5, 1, 0)
    assert entry["mcnemar_p"] == 1.0


def test_labels_of_one_kind_or_none_leave_their_figures_out():
    one_kind = [(*row[:4], [(1, score) for _, score in row[4]]) for row in ROWS]
    steps = all_figures(*candidates(one_kind), Choice("mean", 0.5), "expected", "prm")["steps"]
    assert steps["auc"] is steps["macro_f1"] is None
    assert steps["visual_process_bench"] is steps["process_bench"] is None
    assert steps["brier"] is not None
    none = [(*row[:4], [(None, score) for _, score in row[4]]) for row in ROWS]
    steps = all_figures(*candidates(none), Choice("mean", 0.5), "expected", "prm")["steps"]
    assert steps["labelled"] == 0
    assert steps["ece"] is steps["brier"] is None


def test_the_dev_set_chooses():
    rows = [
        ("q1", "sum", "1", True, [(1, 0.6), (1, 0.6)]),
        ("q1", "sum", "2", False, [(1, 0.9), (0, 0.55)]),  # higher mean, lower minimum
    ]
    choice = choose_on_dev(*candidates(rows), "expected")
    assert choice.aggregation == "min"
    assert choice.threshold == pytest.approx(0.575)
    assert choice.dev is not None
    assert choice.dev["accuracy"]["mean"] == 0.0
    assert choice.dev["accuracy"]["min"] == 1.0
    assert choice.dev["step_macro_f1"] == 1.0
    assert choice.dev["n_questions"] == 1


def test_the_mean_is_kept_where_nothing_beats_it():
    rows = [("q1", "sum", "1", True, [(None, 0.6)]), ("q1", "sum", "2", False, [(None, 0.5)])]
    choice = choose_on_dev(*candidates(rows), "expected")
    assert (choice.aggregation, choice.threshold) == ("mean", 0.5)
    assert choice.dev is not None
    assert choice.dev["step_macro_f1"] is None


def test_a_candidate_without_an_answer_has_no_vote():
    rows = [
        ("q1", "sum", "3", True, [(1, 0.9)]),
        ("q1", "sum", "", False, [(1, 0.6)]),
        ("q1", "sum", None, False, [(1, 0.5)]),
        ("q2", "sum", None, True, [(1, 0.9)]),
        ("q2", "sum", " ", False, [(1, 0.2)]),
    ]
    found = all_figures(*candidates(rows), Choice("mean", 0.5), "expected", "prm")
    assert (found["n_solutions"], found["n_without_answer"]) == (5, 4)
    assert found["n_questions_without_vote"] == 1
    # The one vote of q1 is right. Nobody votes in q2, which counts for no vote and no difference.
    assert found["rows"]["self_consistency"] == found["rows"]["weighted_vote"] == 1.0
    assert found["rows"]["prm"] == 1.0
    entry = found["difference"]["self_consistency"]
    assert (entry["difference"], entry["better"], entry["worse"]) == (0.0, 0, 0)


def test_questions_of_one_answer_right_and_wrong_are_counted_and_groups_spelt_alike():
    rows = [
        ("q1", "sum", "5 cm", True, [(1, 0.9)]),
        ("q1", "sum", r"\boxed{5}", False, [(1, 0.6)]),  # the same, for a vote
        ("q1", "sum", "6", False, [(1, 0.6)]),
        ("q2", "sum", "3", True, [(1, 0.5)]),
        ("q2", "sum", None, True, [(1, 0.5)]),
        ("q2", "sum", None, False, [(1, 0.5)]),  # no answer contradicts none
        (" Q1", "sum", "7", False, [(1, 0.5)]),
    ]
    found = all_figures(*candidates(rows), Choice("mean", 0.5), "expected", "prm")
    assert (found["n_questions"], found["n_contradictory_questions"]) == (3, 1)
    assert found["n_groups_alike"] == 1
    plain = all_figures(*candidates(), Choice("mean", 0.5), "expected", "prm")
    assert (plain["n_contradictory_questions"], plain["n_groups_alike"]) == (0, 0)


def test_without_any_answer_there_is_no_majority_to_beat():
    rows = [(question, domain, None, *rest) for question, domain, _, *rest in ROWS]
    found = all_figures(*candidates(rows), Choice("mean", 0.5), "expected", "prm")
    assert list(found["rows"]) == list(found["ci95"]) == ["pass@1", "prm", "pass@3"]
    assert found["difference"] == {}
    assert found["n_without_answer"] == 6
    assert found["n_questions_without_vote"] == 2


def test_where_no_question_is_mixed_nothing_is_compared():
    rows = [(*row[:3], row[0] == "q1", row[4]) for row in ROWS]
    questions, scores = candidates(rows)
    found = all_figures(questions, scores, Choice("mean", 0.5), "expected", "prm", scores)
    assert found["n_mixed_questions"] == 0
    assert found["rows"] == {"pass@1": 0.5}
    assert found["difference"] == {}


def test_aucs_have_intervals_over_questions(found):
    # Both questions drawn twice, or one of each: q1 wins 2.5 of 5 steps (.6 is wrong), q2 3 of 3.
    q1, q2 = [0.9, 0.7, 0.9, 0.6], [0.5, 0.4, 0.8]
    alone = (sum((s > 0.6) + (s == 0.6) / 2 for s in q1) / 4, sum(s > 0.25 for s in q2) / 3)
    low, high = found["steps"]["auc_ci95"]
    assert [low, high] == pytest.approx([found["steps"]["auc"], max(alone)], abs=1e-4)
    # Solutions: q1 wins 1 of 2 pairs, q2 both.
    assert found["solutions"]["auc_ci95"] == pytest.approx([0.5, 1.0], abs=1e-4)


def test_steps_behind_an_error_are_counted(found):
    assert found["steps"]["labelled_after_an_error"] == 0
    rows = [("q1", "sum", "3", False, [(1, 0.9), (0, 0.6), (None, 0.5), (1, 0.5), (0, 0.1)])]
    steps = all_figures(*candidates(rows), Choice("mean", 0.5), "expected", "prm")["steps"]
    assert steps["labelled_after_an_error"] == 2


def test_solutions_that_are_no_candidates_have_figures_of_steps():
    questions, scores = candidates()
    loose = [replace(example, group=None, correct=None) for example in questions.data.examples]
    bench = candidates_or_steps(Solutions(Path("file.jsonl"), loose))
    assert bench.groups == ()
    found = all_figures(bench, scores, Choice("mean", 0.5), "expected", "prm")
    with_groups = all_figures(questions, scores, Choice("mean", 0.5), "expected", "prm")
    assert (found["rows"], found["difference"], found["best_of_k"]) == ({}, {}, [])
    assert found["n_mixed_questions"] is None
    assert found["n_questions"] == 1  # all ask "?"
    assert found["solutions"]["auc"] is found["solutions"]["brier"] is None
    for name in ("auc", "macro_f1", "brier", "process_bench", "visual_process_bench"):
        assert found["steps"][name] == with_groups["steps"][name]
    chosen = choose_on_dev(bench, scores, "expected")
    assert (chosen.aggregation, chosen.dev["accuracy"]) == ("mean", {})
    assert chosen.threshold == choose_on_dev(questions, scores, "expected").threshold


def test_rows_are_candidates_if_one_of_them_is():
    questions, _ = candidates()
    first, *others = questions.data.examples
    mixed = [first, *(replace(example, group=None) for example in others)]
    with pytest.raises(DataError, match=r"file\.jsonl:2: field group: expected a value"):
        candidates_or_steps(Solutions(Path("file.jsonl"), mixed))
    no_labels = [replace(one, group=None, steps=(Step("a", None),)) for one in others]
    with pytest.raises(DataError, match=r"file\.jsonl:1: field group: expected a value"):
        candidates_or_steps(Solutions(Path("file.jsonl"), no_labels))


def test_a_second_opinion_joins_votes():
    rows = [
        ("q1", "sum", "1+x", True, [(1, 0.5)]),
        ("q1", "sum", "x+1", True, [(1, 0.5)]),
        ("q1", "sum", "7", False, [(1, 0.5)]),
        ("q1", "sum", "7", False, [(1, 0.5)]),
        ("q1", "sum", "1 + x", True, [(1, 0.5)]),
    ]
    questions, _ = candidates(rows)
    assert questions.majority.tolist() == [0.5]
    asked = replace(questions, same_answer=lambda one, other: "x" in one and "x" in other)
    assert asked.majority.tolist() == [1.0]
