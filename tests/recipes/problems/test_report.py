"""Intervals, tables and the command that the recipes share."""

from __future__ import annotations

import errno
from dataclasses import dataclass

import numpy as np
import pytest
from scipy import stats

from recipes.options.base import option
from recipes.problems import report
from recipes.problems.report import Interval, mean_interval, percent, run_recipe, text_table


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


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a recipe."""

    threads: int = option(0, "threads", least=0, most=8)
    output: str | None = option(None, "file")


def test_a_disk_that_is_full_at_the_end_ends_in_a_line(tmp_path, monkeypatch, capsys):
    def run(options):
        """Do nothing."""
        return "text", {}

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(report, "write_json", full)
    out = str(tmp_path / "out.json")
    assert run_recipe("recipes.problems.x", Options, run, ["--output", out]) == 1
    said = capsys.readouterr()
    assert said.out == "text\n"
    assert said.err == f"recipes.problems.x: {out}: No space left on device\n"
    assert run_recipe("recipes.problems.x", Options, run, []) == 0


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    def run(options):
        """Do nothing."""
        raise AssertionError("the work began")

    (tmp_path / "file").write_text("")
    words = ["--output", str(tmp_path / "file" / "out.json")]
    assert run_recipe("recipes.problems.x", Options, run, words) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert run_recipe("recipes.problems.x", Options, run, ["--threads", "9"]) == 2
    assert "--threads: expected at most 8, found 9" in capsys.readouterr().err
