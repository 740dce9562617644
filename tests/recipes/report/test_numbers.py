"""What a report shows of a run: numbers from its files, and a reason for each that is missing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from recipes.options.values import OptionError
from recipes.report.numbers import names_of, read_run, series
from recipes.report.run_weights import RunWeights, effective_share, histogram
from tests.recipes.report.run_directory import LABELS, SOURCES, WEIGHTS, write_data, write_run


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def test_a_complete_run(tmp_path, data):
    run = read_run(write_run(tmp_path / "run", data), "one")
    assert (run.state, run.steps, run.method) == ("complete", (4, 4), "instance_net")
    (test,) = run.files
    assert [(row.name, row.mean, row.low, row.high) for row in test.rows][1] == (
        "instance_net", 0.5, 0.25, 0.75,
    )  # fmt: skip
    assert (test.best_of_k, test.pass_at_k) == ((0.25, 0.5), (0.25, 1.0))
    assert run.log["upper_loss"].steps == (1, 3, 4)  # null is no number
    assert run.log["lower_loss"].values == (1.0, 1 / 2, 1 / 3, 1 / 4)
    assert isinstance(run.weights, RunWeights)
    assert run.weights.sources == SOURCES
    assert "raw_weight" not in run.weights.columns  # null throughout
    assert [(one.end, one.id) for one in run.examples] == [
        ("highest", "e2"), ("highest", "e0"), ("highest", "e3"),
        ("lowest", "e4"), ("lowest", "e5"), ("lowest", "e1"),
    ]  # fmt: skip
    first = run.examples[0]
    assert [(s.mark, s.before, s.after, s.contradicts) for s in first.steps] == [
        ("+", 0.5, 0.25, True), ("-", 0.75, 0.125, False),
    ]  # fmt: skip
    assert first.pictures[0].startswith("data:image/png;base64,")
    assert not run.examples[1].scored


def test_learned_labels_stand_beside_the_given_ones(tmp_path, data):
    run = read_run(write_run(tmp_path / "run", data, **{"labels.jsonl": LABELS}), "run")
    shown = {one.id: [(s.mark, s.learned) for s in one.steps] for one in run.examples}
    assert shown["e2"] == [("+", 0.25), ("-", 0.125)]
    assert all(one.relabelled for one in run.examples)
    plain = read_run(write_run(tmp_path / "plain", data), "plain")
    assert [(s.learned, plain.examples[0].relabelled) for s in plain.examples[0].steps] == [
        (None, False), (None, False),
    ]  # fmt: skip


def test_what_is_missing_has_a_reason(tmp_path, data):
    young = {"weights.jsonl": None, "results.json": None, "extreme_weights.jsonl": None}
    run = read_run(write_run(tmp_path / "young", data, **young), "young")
    assert run.state == "stopped"
    assert "no weights.jsonl" in run.weights
    assert run.files == ()
    assert run.troubles == {"weights_at_bound": 4}  # summed from the log
    whole = write_run(tmp_path / "whole", data)
    (data.parent / "a.png").unlink()
    (example, *_) = read_run(whole, "whole").examples
    assert example.pictures == ()
    assert len(example.without) == 1
    assert example.without[0].startswith("a.png: not shown (")
    data.unlink()
    assert "is not there any more" in read_run(whole, "whole").examples
    with pytest.raises(OptionError, match="found no args"):
        read_run(tmp_path, "none")


def test_statistics_have_their_closed_forms():
    weights = np.array(WEIGHTS)
    assert effective_share(weights) == pytest.approx(36 / (6 * 8.375))
    assert effective_share(np.zeros(3)) == 0
    counts, edges = histogram(weights, 7)  # of width 1/4 from 1/4 on
    assert counts.tolist() == [1, 2, 0, 0, 1, 1, 1]
    assert edges == pytest.approx(np.arange(0.25, 2.1, 0.25))
    assert histogram(np.ones(5), 7)[0].tolist() == [5]


def test_series_leave_out_what_is_no_number():
    found = series([{"step": 1, "a": 1, "b": True, "c": "x"}, {"step": 2, "a": None}])
    assert set(found) == {"a"}
    assert found["a"].values == (1.0,)
    assert not any(math.isnan(value) for value in found["a"].values)


def test_names_are_as_short_as_they_differ(tmp_path):
    assert names_of([tmp_path / "a" / "x", tmp_path / "b" / "y"]) == ["x", "y"]
    assert names_of([tmp_path / "a" / "x", tmp_path / "b" / "x"]) == ["a/x", "b/x"]
