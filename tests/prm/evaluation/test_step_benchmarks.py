from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from prm.evaluation.metrics import macro_f1
from prm.evaluation.step_benchmarks import (
    NO_ERROR,
    best_threshold,
    first_error,
    process_bench,
    visual_process_bench,
)

STEPS = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from([0.1, 0.3, 0.5, 0.6, 0.9])), min_size=2
).filter(lambda items: len({truth for truth, _ in items}) == 2)


@pytest.mark.parametrize(
    ("right", "place"),
    [
        ([True, True, False, False], 2),
        ([False], 0),
        ([True, True], NO_ERROR),
        ([True, False, None, None], 1),
        ([True, None, False], None),
        ([None], None),
    ],
)
def test_first_error(right, place):
    assert first_error(right) == place


def test_process_bench_by_hand():
    # Errors at 0, 2, 1, 3: two found at their place. Three without error, one of them suspected.
    truth = [0, 2, 1, 3, -1, -1, -1]
    said = [0, 2, 2, -1, -1, -1, 4]
    found = process_bench(truth, said)
    assert (found.accuracy_erroneous, found.accuracy_correct) == (2 / 4, 2 / 3)
    assert (found.erroneous, found.correct) == (4, 3)
    assert found.f1 == pytest.approx(2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3))  # 4/7
    assert found.f1 == pytest.approx(4 / 7)
    assert process_bench([0, -1], [1, 0]).f1 == 0.0
    assert process_bench([0, -1], [0, -1]).f1 == 1.0


def test_visual_process_bench_pools_steps_and_not_sources():
    truth = [1, 1, 1, 0, 1, 0]
    said = [1, 1, 0, 0, 0, 1]
    found = visual_process_bench(truth, said, ["a"] * 4 + ["b"] * 2)
    # a: right 2·2/(2·2+1) = .8, wrong 2·1/(2·1+1) = 2/3; b: nothing hit.
    assert found.per_source == {"a": pytest.approx((0.8 + 2 / 3) / 2), "b": 0.0}
    assert found.mean == pytest.approx((0.8 + 2 / 3) / 4)
    # Pooled: right 2·2/(2·2+1+2), wrong 2·1/(2·1+2+1).
    assert found.pooled == pytest.approx((4 / 7 + 2 / 5) / 2)
    assert found.pooled == pytest.approx(sklearn.metrics.f1_score(truth, said, average="macro"))


@given(STEPS)
def test_best_threshold_is_the_best_of_all(items):
    truth, scores = map(np.array, zip(*items, strict=True))
    threshold, figure = best_threshold(truth, scores)
    assert figure == pytest.approx(macro_f1(truth, scores > threshold), abs=1e-12)
    levels = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.75, 0.9, 0.95)
    assert figure >= max(macro_f1(truth, scores > level) for level in levels) - 1e-12


def test_best_threshold_by_hand():
    truth, scores = [1, 1, 0, 0], [0.9, 0.8, 0.7, 0.2]
    assert best_threshold(truth, scores) == (pytest.approx(0.75), 1.0)
    # Several thresholds separate them as well: the one nearest to 1/2.
    assert best_threshold([1, 0], [0.9, 0.2]) == (0.5, 1.0)
    assert best_threshold([1, 0], [0.4, 0.2]) == (pytest.approx(0.3), 1.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: process_bench([0, 1], [0, 1]), "found 2 with and 0 without"),
        (lambda: process_bench([0], [0, 1]), "found 1 and 2"),
        (lambda: visual_process_bench([1, 0], [1, 0], ["a"]), "found 1 for 2 steps"),
        (lambda: visual_process_bench([], [], []), "found 0 for 0 steps"),
        (lambda: best_threshold([1, 1], [0.5, 0.1]), "found 2 right of 2"),
        (lambda: best_threshold([1, 0], [0.5]), "2 and 1 scores"),
    ],
)
def test_bad_calls_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
