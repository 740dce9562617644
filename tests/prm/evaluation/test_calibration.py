from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from prm.evaluation.calibration import brier, expected_calibration_error, reliability

JUDGED = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), min_size=2, max_size=40).filter(
    lambda items: len({truth for _, truth in items}) == 2
)


def test_by_hand():
    said, truth = [0.1, 0.3, 0.9, 0.9, 0.9], [0, 1, 1, 1, 0]
    assert brier(said, truth) == pytest.approx((0.01 + 0.49 + 0.01 + 0.01 + 0.81) / 5)
    # Bins (0, .25], (.25, .5], (.75, 1]: off by .1 once, .7 once and |2/3 - .9| three times.
    assert expected_calibration_error(said, truth, 4) == pytest.approx((0.1 + 0.7 + 0.7) / 5)
    found = reliability(said, truth, 4)
    assert [(one.low, one.high, one.items) for one in found] == [
        (0.0, 0.25, 1), (0.25, 0.5, 1), (0.75, 1.0, 3)
    ]  # fmt: skip
    assert found[2].mean_probability == pytest.approx(0.9)
    assert found[2].mean_truth == pytest.approx(2 / 3)


def test_soft_labels_are_taken_as_they_are():
    assert brier([0.25, 0.5], [0.75, 0.5]) == pytest.approx(0.125)
    assert expected_calibration_error([0.2, 0.2], [0.4, 0.2], 1) == pytest.approx(0.1)
    assert expected_calibration_error([0.3, 0.7], [0.3, 0.7]) == 0.0


def test_a_value_on_an_edge_belongs_to_the_bin_below_it():
    found = reliability([0.0, 0.5, 0.50001, 1.0], [0, 0, 1, 1], 2)
    assert [one.items for one in found] == [2, 2]


@given(JUDGED, st.integers(1, 12))
def test_equal_scikit_learn(items, bins):
    said, truth = map(np.array, zip(*items, strict=True))
    assert brier(said, truth) == pytest.approx(brier_score_loss(truth, said), abs=1e-12)
    true, mean = calibration_curve(truth, said, n_bins=bins)
    found = reliability(said, truth, bins)
    assert [one.mean_truth for one in found] == pytest.approx(true.tolist(), abs=1e-12)
    assert [one.mean_probability for one in found] == pytest.approx(mean.tolist(), abs=1e-12)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: brier([0.5, 1.5], [0, 1]), r"probabilities to be .* in \[0, 1\], found 1.5"),
        (lambda: brier([0.5], [float("nan")]), "truth to be .* found nan"),
        (lambda: brier([0.5], [0, 1]), "found 1 and 2"),
        (lambda: brier([], []), "found 0 and 0"),
        (lambda: brier([[0.5]], [[1]]), r"found shape \(1, 1\)"),
        (lambda: expected_calibration_error([0.5], [1], 0), "bins >= 1, found 0"),
    ],
)
def test_bad_calls_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
