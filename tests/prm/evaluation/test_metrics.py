from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from prm.evaluation.metrics import (
    best_of_k_curve,
    bootstrap_interval,
    expected_best_of_k,
    f1,
    macro_f1,
    mcnemar,
    paired_interval,
    pass_at_k,
    rank_correlation,
    roc_auc,
    roc_auc_interval,
)
from prm.evaluation.select import best_of_n

SCORED = st.lists(
    st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.9]), st.integers(0, 1)), min_size=1, max_size=7
)


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlation_is_scipys(seed):
    generator = np.random.default_rng(seed)
    left = generator.integers(0, 6, 40)
    right = left + generator.normal(0, 3, 40).round()
    expected = scipy.stats.spearmanr(left, right).statistic
    assert rank_correlation(left, right) == pytest.approx(expected, abs=1e-12)
    assert rank_correlation(left, -left.astype(float)) == pytest.approx(-1.0)


@given(SCORED)
def test_best_of_k_equals_the_mean_over_all_subsets(candidates):
    scores, correct = map(list, zip(*candidates, strict=True))
    for k in range(1, len(scores) + 1):
        subsets = list(itertools.combinations(range(len(scores)), k))
        brute = sum(
            best_of_n([scores[i] for i in subset], [correct[i] for i in subset])
            for subset in subsets
        ) / len(subsets)
        assert expected_best_of_k(scores, correct, k) == pytest.approx(brute, abs=1e-12)
        oracle = sum(any(correct[i] for i in subset) for subset in subsets) / len(subsets)
        assert pass_at_k(correct, k) == pytest.approx(oracle, abs=1e-12)


def test_best_of_k_by_hand():
    scores, correct = [0.9, 0.8, 0.7, 0.6], [0, 1, 0, 1]
    # k = 2: rank 0 is the best of 3 of 6 pairs, rank 1 of 2, rank 2 of 1.
    assert expected_best_of_k(scores, correct, 2) == pytest.approx(2 / 6)
    assert expected_best_of_k(scores, correct, 1) == pytest.approx(0.5)
    assert expected_best_of_k(scores, correct, 4) == 0.0
    assert best_of_k_curve(scores, correct) == pytest.approx([1 / 2, 1 / 3, 1 / 4, 0.0])
    assert pass_at_k(correct, 2) == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("better", "worse", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 32),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
        (3, 3, 1.0),
        (121, 59, None),
    ],
)
def test_mcnemar_is_the_exact_binomial_test(better, worse, p_value):
    # 7 questions both get right, 4 both get wrong: they say nothing.
    values = [1] * better + [0] * worse + [1] * 7 + [0] * 4
    baseline = [0] * better + [1] * worse + [1] * 7 + [0] * 4
    found = mcnemar(values, baseline)
    assert (found.better, found.worse) == (better, worse)
    if p_value is not None:
        assert found.p_value == pytest.approx(p_value, rel=1e-12)
    if better + worse:
        reference = scipy.stats.binomtest(better, better + worse).pvalue
        assert found.p_value == pytest.approx(reference, rel=1e-9)


def test_mcnemar_of_shared_ties_is_the_sign_test():
    assert mcnemar([0.5, 1, 0.25, 0.5], [0, 0.5, 0, 0.5]) == (3, 0, 2 / 8)


def test_many_candidates_do_not_overflow():
    rng = np.random.default_rng(0)
    scores, correct = rng.random(2000), rng.integers(0, 2, 2000)
    values = [expected_best_of_k(scores, correct, k) for k in (1, 1000, 2000)]
    assert values[0] == pytest.approx(correct.mean())
    assert values[2] == correct[scores.argmax()]
    assert pass_at_k([1] + [0] * 1999, 500) == pytest.approx(0.25)


@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.25, 0.5, 0.75])), min_size=2
    ).filter(lambda items: len({truth for truth, _ in items}) == 2)
)
def test_auc_and_f1_equal_scikit_learn(items):
    truth, scores = map(np.array, zip(*items, strict=True))
    said = scores > 0.3
    assert roc_auc(truth, scores) == pytest.approx(sklearn.metrics.roc_auc_score(truth, scores))
    options = {"zero_division": 0.0, "labels": [0, 1], "average": None}
    wrong, right = sklearn.metrics.f1_score(truth, said, **options)
    assert f1(truth, said) == pytest.approx(right)
    assert f1(1 - truth, ~said) == pytest.approx(wrong)
    assert macro_f1(truth, said) == pytest.approx((right + wrong) / 2)


def test_interval_of_a_mean():
    rng = np.random.default_rng(1)
    values = rng.integers(0, 2, 400).astype(float)
    low, high = bootstrap_interval(values)
    error = values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error + 1 / 400)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error + 1 / 400)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)
    narrow = bootstrap_interval(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap_interval([0.5]) == (0.5, 0.5)


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(2)
    hits = 0
    for seed in range(300):
        low, high = bootstrap_interval(rng.normal(3, 1, 100), resamples=1000, seed=seed)
        hits += low <= 3 <= high
    assert 0.90 <= hits / 300 <= 0.98  # 95 % less the known shortfall, within 3 standard errors


def test_pairing_removes_what_questions_have_in_common():
    rng = np.random.default_rng(3)
    hardness = rng.normal(0, 5, 200)
    first, second = hardness + 1, hardness
    low, high = paired_interval(first, second)
    assert low == pytest.approx(1)
    assert high == pytest.approx(1)
    noisy = first + rng.normal(0, 1, 200)
    assert paired_interval(noisy, second) == bootstrap_interval(noisy - second)


def test_resampling_in_slices_gives_all_resamples(monkeypatch):
    values = np.random.default_rng(4).random(3000)
    low, high = bootstrap_interval(values, resamples=4000)  # more than one slice
    error = values.std() / math.sqrt(3000)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: pass_at_k([1, 0], 3), "1 <= k <= 2.*found k = 3"),
        (lambda: pass_at_k([1, 0.5], 1), "correct to be 0 or 1, found 0.5"),
        (lambda: expected_best_of_k([0.5], [1, 0], 1), "found 1 and 2"),
        (lambda: expected_best_of_k([math.nan, 0.1], [1, 0], 1), "scores to be a list of numbers"),
        (lambda: expected_best_of_k([0.5, 0.1], [1, 0], 0), "found k = 0"),
        (lambda: roc_auc([1, 1], [0.5, 0.1]), "found 2 true and 0 false"),
        (lambda: roc_auc([1, 0], [0.5]), "found 2 and 1"),
        (lambda: rank_correlation([1, 2], [0.5]), "found 2 and 1"),
        (lambda: rank_correlation([1, 2], [0.5, 0.5]), "on one all are equal"),
        (lambda: f1([1, 2], [0, 1]), "truth to be 0 or 1, found 2"),
        (lambda: bootstrap_interval([]), "at least one value"),
        (lambda: bootstrap_interval([1, math.nan]), "1 NaN"),
        (lambda: bootstrap_interval([1.0], level=95), "between 0 and 1, found 95"),
        (lambda: paired_interval([1.0], [1.0, 2.0]), "found 1 and 2"),
        (lambda: mcnemar([1.0], [1.0, 2.0]), "found 1 and 2"),
    ],
)
def test_bad_calls_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("levels", [5, 1000])
def test_the_interval_of_the_auc_resamples_whole_questions(levels):
    rng = np.random.default_rng(1)
    question = rng.integers(12, size=90)
    truth = (rng.random(90) < 0.7).astype(float)
    scores = np.round(rng.random(90) + truth / 3, 3 if levels > 5 else 1)
    aucs = []
    for drawn in np.random.default_rng(4).integers(12, size=(200, 12)):
        rows = np.concatenate([np.flatnonzero(question == number) for number in drawn])
        aucs.append(sklearn.metrics.roc_auc_score(truth[rows], scores[rows]))
    found = roc_auc_interval(truth, scores, question, level=0.9, resamples=200, seed=4)
    assert found == pytest.approx(np.quantile(aucs, [0.05, 0.95]), abs=1e-12)
    # Names of questions and the order of items do not matter.
    order = rng.permutation(90)
    named = np.array([f"q{number:02}" for number in question])
    again = roc_auc_interval(
        truth[order], scores[order], named[order], level=0.9, resamples=200, seed=4
    )
    assert again == pytest.approx(found, abs=1e-12)


def test_the_interval_of_the_auc_takes_many_questions():
    """Twenty thousand questions of two items: all pairs of questions would take minutes."""
    rng = np.random.default_rng(3)
    question = np.repeat(np.arange(20_000), 2)
    truth = np.tile([0, 1], 20_000)
    scores = rng.random(40_000) + truth / 4
    low, high = roc_auc_interval(truth, scores, question, resamples=50)
    auc = roc_auc(truth, scores)
    assert low < auc < high
    assert high - low < 0.02


def test_resamples_of_one_kind_have_no_auc():
    # A question of right and one of wrong items: only resamples of both have an AUC, which is 3/4.
    low, high = roc_auc_interval([1, 1, 0, 0], [0.9, 0.5, 0.6, 0.1], [0, 0, 1, 1])
    assert (low, high) == (0.75, 0.75)


def test_the_interval_of_the_auc_refuses_what_has_none():
    with pytest.raises(ValueError, match="items of both kinds, found 2 true and 0 false"):
        roc_auc_interval([1, 1], [0.5, 0.6], [0, 1])
    with pytest.raises(ValueError, match="two lists of one length"):
        roc_auc_interval([1, 0], [0.5, 0.6], [0])
    with pytest.raises(ValueError, match="level between 0 and 1, found 95"):
        roc_auc_interval([1, 0], [0.5, 0.6], [0, 1], level=95)
