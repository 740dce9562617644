"""Statistics over seeds: means, paired differences, and intervals against closed forms."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

import recipes.comparison.compare
import recipes.options.parse
import recipes.train.dev_evaluation
import recipes.train.loop
import recipes.train.training
from recipes.comparison.compare import compare, statistics
from recipes.embedded.build import build
from recipes.evaluation.table import NAMES
from recipes.options.embedded import CompareOptions
from recipes.options.parse import PRESETS
from tests.tiny_task import SIZES, model_bits, read_lines

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


@pytest.fixture
def tiny(task, tmp_path, monkeypatch):
    """The comparison as shipped, on the tiny model and a few steps of few examples."""
    shrunk = {"steps": 4, "batch_size": 6, "meta_batch_size": 6, "upper_start": 1}
    (tmp_path / "presets").mkdir()
    for path in PRESETS.glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        if "init_from" not in content:
            content["model"] = str(task.model)
        kept = shrunk if path.stem.startswith("train") else {"steps": 4, "batch_size": 6}
        if "gradient_features" in content:
            kept = kept | {"gradient_features": 4}
        text = yaml.safe_dump(content | kept)
        (tmp_path / "presets" / path.name).write_text(text)
    sizes = replace(SIZES, dev_questions=12)  # some have right and wrong candidates
    monkeypatch.setattr(recipes.options.parse, "PRESETS", tmp_path / "presets")
    monkeypatch.setattr(
        recipes.comparison.compare, "build", lambda at, *, seed: build(at, seed=seed, sizes=sizes)
    )
    monkeypatch.setattr(recipes.comparison.compare, "_RESAMPLES", 200)
    return CompareOptions(
        output_dir=str(tmp_path / "results"),
        work_dir=str(tmp_path / "work"),
        seeds=2,
        # Without a ceiling: whether it is above No Selection here is chance.
        methods=tuple(
            name for name in recipes.comparison.compare._METHODS if name != "clean_oracle"
        ),
        threads=1,
        progress=False,
    )


def test_every_method_on_every_seed(tiny, tmp_path, monkeypatch, capsys):
    report = compare(tiny)
    methods = set(report["runs"])
    assert methods == set(tiny.methods) >= {"cold_start", "instance_net", "instance_table"}
    stopped = {f"{method}_dev_stopped" for method in methods - {"cold_start"}}
    shared = {"pass@1", "self_consistency", "pass@4"}
    assert set(report["rows"]) == methods | stopped | shared
    assert set(report["difference"]) == (methods | stopped | shared) - {
        "no_selection",
        "no_selection_dev_stopped",
    }
    assert methods <= set(NAMES)
    assert report == json.loads((tmp_path / "results" / "compare.json").read_text())
    assert "| PRM: No Selection |" in capsys.readouterr().out
    for method, runs in report["runs"].items():
        assert [run["seed"] for run in runs] == [0, 1]
        mean = sum(run["accuracy"] for run in runs) / 2
        row = method if method == "cold_start" else f"{method}_dev_stopped"
        assert report["rows"][row] == pytest.approx(mean, abs=1e-4)
    seeds = [tmp_path / "work" / f"seed-{seed}" for seed in (0, 1)]
    assert len({(seed / "data" / "test.jsonl").read_bytes() for seed in seeds}) == 2
    for seed in seeds:
        started = model_bits(seed / "cold-start")
        assert model_bits(seed / "cold-start-evaluated") == started
        for run in filter(Path.is_dir, seed.iterdir()):
            check_rows_of(run, seed)
    # A second call finds everything done.
    monkeypatch.setattr(recipes.comparison.compare, "run_training", None)
    monkeypatch.setattr(recipes.comparison.compare, "run_cold_start", None)
    assert compare(tiny) == report


def test_shuffled_weights_are_the_learned_ones_on_other_examples(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes.train.training, "best_of", lambda scores: scores[-1])
    monkeypatch.setattr(
        recipes.train.dev_evaluation, "best_of", lambda scores: scores[-1]
    )  # whose weights are not those of the start
    compare(replace(tiny, seeds=1, methods=("no_selection", "shuffled_table")))
    seed = tmp_path / "work" / "seed-0"
    learned = {row["id"]: row["weight"] for row in read_lines(seed / "table" / "weights.jsonl")}
    dealt = {row["id"]: row["weight"] for row in read_lines(seed / "shuffled-table-weights.jsonl")}
    assert sorted(dealt.values()) == sorted(learned.values())
    assert dealt != learned
    assert list(dealt) == list(learned)


@pytest.mark.parametrize("where", ["cold-start", "no-selection"])
def test_an_interrupted_comparison_goes_on(tiny, tmp_path, monkeypatch, where):
    """A run that was killed after its second step is resumed, and the numbers are the same."""
    small = replace(tiny, seeds=1, methods=("cold_start", "no_selection"))
    whole = compare(replace(small, work_dir=str(tmp_path / "whole")))
    append, run = recipes.train.loop.append_line, tmp_path / "work" / "seed-0" / where

    def killed(path, line):
        append(path, line)
        if path == run / "log.jsonl":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(recipes.train.loop, "append_line", killed)
        with pytest.raises(Killed):
            compare(small)
    assert (run / "args.yaml").exists()
    assert not (run / "results.json").exists()
    found = compare(small)
    assert found["rows"] == whole["rows"]
    assert found["per_seed"] == whole["per_seed"]
    for name in ("cold-start", "no-selection"):
        bits = [model_bits(tmp_path / at / "seed-0" / name) for at in ("whole", "work")]
        assert bits[0] == bits[1]


def check_rows_of(run: Path, seed: Path) -> None:
    """The row of the last model is that of ``last/`` where the best dev step is another."""
    if not (run / "results.json").exists() or run.name.endswith("-last"):
        return
    chosen = json.loads((run / "results.json").read_text()).get("model_selection")
    if chosen is None:
        return
    dev = [row for row in read_lines(run / "log.jsonl") if row["phase"] == "dev"]
    top = max(row["best_of_n"] for row in dev)
    assert chosen["step"] == next(row["step"] for row in dev if row["best_of_n"] == top)
    scored = seed / f"{run.name}-last"
    assert scored.exists() == (chosen["step"] != dev[-1]["step"])
    if scored.exists():
        assert model_bits(scored) == model_bits(run / "last")


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


class Killed(BaseException):
    """The end of a process that nothing catches."""
