"""Intervals, tables and the command that the recipes share."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from recipes.problems.report import Interval, mean_interval, percent, text_table


@pytest.mark.parametrize("count", [2, 3, 5, 21])
def test_interval_is_students(count):
    values = np.random.default_rng(count).normal(size=count)
    expected = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
    # The quantiles are stored with three decimals.
    np.testing.assert_allclose(mean_interval(list(values))[1:], expected, rtol=0, atol=1e-3)
    assert mean_interval(list(values)).mean == pytest.approx(values.mean(), rel=1e-12)


def test_interval_of_one_value_and_of_many():
    assert mean_interval([0.25]) == Interval(0.25, None, None)
    values = list(np.random.default_rng(0).normal(size=60))
    exact = stats.t.interval(0.95, 59, np.mean(values), stats.sem(values))
    found = mean_interval(values)
    assert 1 <= (found.high - found.low) / (exact[1] - exact[0]) < 1.06


def test_text():
    assert percent(Interval(0.5, 0.25, 0.75)) == "50.0 [25.0, 75.0]"
    assert percent(Interval(0.015, None, None), sign=True) == "+1.5"
    assert text_table([["a", "bb"], ["ccc", ""]]) == "\n".join(
        ["| a   | bb |", "|-----|----|", "| ccc |    |"]
    )
