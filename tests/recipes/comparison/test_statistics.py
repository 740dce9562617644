"""Statistics over seeds: means, paired differences, and intervals against closed forms."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from recipes.comparison.statistics import difference, statistics

Z = 1.959964


def test_means_are_over_seeds_not_over_questions():
    report = statistics(
        [
            {"pass@1": np.array([0.5, 0.5]), "no_selection": np.array([1.0, 0.0])},
            {"pass@1": np.array([0.25] * 6), "no_selection": np.array([1.0] * 6)},
        ]
    )
    assert report["seeds"] == 2
    assert report["n_questions"] == [2, 6]
    assert report["rows"] == {"pass@1": 0.375, "no_selection": 0.75}
    assert report["per_seed"] == {"pass@1": [0.5, 0.25], "no_selection": [0.5, 1.0]}
    assert report["difference"] == {"pass@1": -0.375}
    assert "gap_closed" not in report


def test_without_no_selection_there_is_nothing_to_compare_with():
    report = statistics([{"instance_net": np.array([1.0, 0.0])}])
    assert set(report) == {"seeds", "n_questions", "rows", "ci95", "per_seed"}


def test_one_seed_is_the_bootstrap_over_questions():
    """Binomial: the quantiles of a resampled mean of 0s and 1s are those of Binomial(n, p) / n."""
    report = statistics([{"instance_net": np.array([1.0] * 30 + [0.0] * 70)}])
    sizes = np.arange(101)
    chance = np.array([math.comb(100, k) * 0.3**k * 0.7 ** (100 - k) for k in sizes]).cumsum()
    exact = [int(np.searchsorted(chance, end)) / 100 for end in (0.025, 0.975)]
    assert report["ci95"]["instance_net"] == pytest.approx(exact, abs=0.01)


def test_variance_has_a_part_between_and_a_part_within_seeds():
    """Var = (between + within / n) / S with S seeds of n questions, both parts of the sample."""
    rng = np.random.default_rng(3)
    means = rng.uniform(0.4, 0.6, 12)
    per_seed = [{"no_selection": rng.normal(mean, 0.5, 40)} for mean in means]
    found = [values["no_selection"] for values in per_seed]
    between = np.var([values.mean() for values in found])
    within = np.mean([values.var() for values in found])
    spread = math.sqrt((between + within / 40) / 12)
    low, high = statistics(per_seed)["ci95"]["no_selection"]
    assert (high - low) / 2 == pytest.approx(Z * spread, rel=0.04)
    assert (high + low) / 2 == pytest.approx(np.mean([v.mean() for v in found]), abs=0.1 * spread)


def test_differences_are_paired():
    """What a question contributes to both rows cancels; a constant shift has no interval."""
    rng = np.random.default_rng(0)
    base = [rng.integers(0, 2, 50).astype(float) for _ in range(3)]
    report = statistics(
        [
            {"no_selection": values, "instance_net": values + 0.1, "clean_oracle": values + 0.4}
            for values in base
        ]
    )
    assert report["difference"] == {"instance_net": 0.1, "clean_oracle": 0.4}
    assert report["difference_ci95"] == {"instance_net": [0.1, 0.1], "clean_oracle": [0.4, 0.4]}
    assert report["gap_closed"] == {"instance_net": 0.25, "clean_oracle": 1.0}
    assert report["gap_closed_ci95"] == {"instance_net": [0.25, 0.25], "clean_oracle": [1.0, 1.0]}
    low, high = report["ci95"]["no_selection"]
    assert high - low > 0.1


def test_no_gap_to_close():
    """A ceiling that is no higher than No Selection must not lose the report."""
    alike = np.array([1.0, 0.0, 1.0])
    report = statistics(
        [{"no_selection": alike, "instance_net": np.ones(3), "clean_oracle": alike}]
    )
    assert report["difference"]["clean_oracle"] == 0.0
    json.dumps(report, allow_nan=False)


def test_constant_rows_have_no_interval_and_the_same_call_gives_the_same_report():
    per_seed = [
        {"no_selection": np.array([0.0, 1.0, 1.0]), "pass@8": np.ones(3)},
        {"no_selection": np.array([1.0, 1.0, 0.0]), "pass@8": np.ones(3)},
    ]
    report = statistics(per_seed)
    assert report["ci95"]["pass@8"] == [1.0, 1.0]
    assert report == statistics(per_seed)


def test_stopped_rows_are_compared_with_stopped_rows():
    """No Selection and ceiling of the same kind: each kind has a gap of its own."""
    base = np.array([0.0, 1.0, 0.0, 1.0])
    report = statistics(
        [
            {"no_selection": base, "instance_net": base + 0.1, "clean_oracle": base + 0.2}
            | {"no_selection_dev_stopped": base + 1, "instance_net_dev_stopped": base + 1.3}
            | {"clean_dev_stopped": base + 1.4}
        ]
    )
    assert report["difference"] == {
        "instance_net": 0.1,
        "clean_oracle": 0.2,
        "instance_net_dev_stopped": 0.3,
        "clean_dev_stopped": 0.4,
    }
    assert report["gap_closed"]["instance_net"] == 0.5
    assert report["gap_closed"]["instance_net_dev_stopped"] == 0.75


def test_a_difference_is_paired_by_question():
    """A constant difference has no interval, however much the questions vary."""
    rng = np.random.default_rng(0)
    base = [rng.integers(0, 2, 40).astype(float) for _ in range(2)]
    per_seed = [{"a": values + 0.25, "b": values} for values in base]
    assert difference(per_seed, "a", "b") == {
        "difference": 0.25,
        "difference_ci95": [0.25, 0.25],
    }
    assert difference(per_seed, "b", "a")["difference"] == -0.25
