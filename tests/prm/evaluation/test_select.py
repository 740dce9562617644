from __future__ import annotations

import math
from inspect import unwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prm.evaluation.select import best_candidate, best_of_n, self_consistency, weighted_vote

CANDIDATES = st.lists(
    st.tuples(st.sampled_from(["x", "y", "z", None]), st.sampled_from([0.1, 0.2, 0.3, 0.6])),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize(("tie", "value"), [("expected", 1 / 3), ("first", 0.0), ("last", 1.0)])
def test_best_of_n_settles_ties_as_declared(tie, value):
    scores, correct = [0.9, 0.1, 0.9, 0.9], [0, 1, 0, 1]
    assert best_of_n(scores, correct, tie=tie) == pytest.approx(value, abs=1e-15)
    assert best_of_n([0.1, 0.9, 0.2, 0.3], correct, tie=tie) == 1.0


@pytest.mark.parametrize(("tie", "value"), [("expected", 0.5), ("first", 0.0), ("last", 1.0)])
def test_self_consistency_settles_ties_as_declared(tie, value):
    answers = ["wrong", "right", None, "right", "wrong", "other", None, None]
    correct = [0, 1, 0, 1, 0, 0, 0, 0]
    assert self_consistency(answers, correct, tie=tie) == value
    assert self_consistency([*answers, "right"], [*correct, 1], tie=tie) == 1.0


def test_weighted_vote_by_hand():
    answers, correct = ["a", "a", "b"], [0, 0, 1]
    assert weighted_vote(answers, [0.3, 0.3, 0.7], correct) == 1.0
    assert weighted_vote(answers, [0.4, 0.4, 0.7], correct) == 0.0
    assert weighted_vote(answers, [0.25, 0.25, 0.5], correct) == 0.5
    assert weighted_vote(["a", "a"], [0.5, 0.5], [1, 0]) == 0.5  # the same answer, judged twice


def test_ties_do_not_depend_on_rounding():
    # 0.1 + 0.2 + 0.6 rounds differently from 0.6 + 0.2 + 0.1.
    answers = ["a", "a", "a", "b", "b", "b"]
    assert weighted_vote(answers, [0.1, 0.2, 0.6, 0.6, 0.2, 0.1], [1, 1, 1, 0, 0, 0]) == 0.5


@given(CANDIDATES, st.randoms())
def test_expected_does_not_depend_on_the_order_of_candidates(candidates, random):
    def values(rows):
        answers, scores = zip(*rows, strict=True)
        correct = [float(answer == "x") for answer in answers]
        return (
            best_of_n(scores, correct),
            self_consistency(answers, correct),
            weighted_vote(answers, scores, correct),
        )

    shuffled = random.sample(candidates, len(candidates))
    assert values(candidates) == values(shuffled)


@given(CANDIDATES)
def test_first_and_last_mirror_each_other_and_enclose_expected(candidates):
    answers, scores = zip(*candidates, strict=True)
    correct = [float(answer == "x") for answer in answers]
    first, last, expected = (
        best_of_n(scores, correct, tie=tie) for tie in ("first", "last", "expected")
    )
    assert best_of_n(scores[::-1], correct[::-1], tie="last") == first
    assert min(first, last) in (0.0, 1.0)
    best = [c for s, c in zip(scores, correct, strict=True) if s == max(scores)]
    assert expected == pytest.approx(sum(best) / len(best))
    assert (first, last) == (best[0], best[-1])


def test_no_answer_at_all_is_wrong():
    assert self_consistency([None, None], [0, 0]) == 0.0


def test_infinite_scores_are_scores_and_nan_is_not():
    assert best_of_n([-math.inf, -5.0], [0, 1]) == 1.0
    with pytest.raises(ValueError, match="score of candidate 1, found NaN"):
        best_of_n([0.5, math.nan], [0, 1])


def test_best_candidate_is_one_of_the_tied():
    scores = [0.9, 0.1, 0.9, 0.9]
    assert best_candidate(scores, tie="first") == (0, (0, 2, 3))
    assert best_candidate(scores, tie="last") == (3, (0, 2, 3))
    assert best_candidate([0.1, 0.9, 0.2]) == (1, (1,))
    drawn = [best_candidate(scores, seed=f"{seed}")[0] for seed in range(300)]
    assert drawn == [best_candidate(scores, seed=f"{seed}")[0] for seed in range(300)]
    assert set(drawn) == {0, 2, 3}
    assert all(abs(drawn.count(place) - 100) < 25 for place in (0, 2, 3))  # 3 standard errors


@given(CANDIDATES)
def test_a_draw_is_worth_what_expected_says(candidates):
    answers, scores = zip(*candidates, strict=True)
    correct = [float(answer == "x") for answer in answers]
    _, tied = best_candidate(scores)
    mean = sum(correct[place] for place in tied) / len(tied)
    assert mean == pytest.approx(best_of_n(scores, correct), abs=1e-15)


def test_bad_calls_are_refused():
    with pytest.raises(ValueError, match="found none"):
        best_candidate([])
    with pytest.raises(ValueError, match="score of candidate 1, found NaN"):
        best_candidate([0.5, math.nan])
    with pytest.raises(ValueError, match="'random', 'first' or 'last', found 'expected'"):
        unwrap(best_candidate)([0.5], tie="expected")  # without type checks of tests
    with pytest.raises(ValueError, match="found none"):
        best_of_n([], [])
    with pytest.raises(ValueError, match="found 1 scores and 2 correct"):
        best_of_n([0.5], [0, 1])
    with pytest.raises(ValueError, match="found 1 answers and 2 correct"):
        self_consistency(["a"], [0, 1])
    with pytest.raises(ValueError, match="'expected', 'first' or 'last', found 'any'"):
        unwrap(best_of_n)([0.5], [1], tie="any")
