"""The comparison on the tiny model: every row as it is defined, resumption, several processes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import recipes.comparison.rows
import recipes.comparison.runs
import recipes.comparison.statistics
import recipes.options.parse
import recipes.train.dev_evaluation
import recipes.train.loop
import recipes.train.training
from recipes.comparison.compare import compare
from recipes.comparison.rows import DATA, ROWS
from recipes.comparison.settings import SETTINGS
from recipes.evaluation.table import NAMES
from recipes.options.embedded import CompareOptions
from recipes.options.parse import PRESETS
from recipes.options.values import OptionError
from recipes.run.errors import NonFiniteError, StepError
from tests.tiny_task import SIZES, model_bits, read_lines

ALONE = ("base", "cold_start")  # rows that train nothing
VARIED = ("instance_table_meta_solutions_48", "instance_table_aggregation_last")


@pytest.fixture
def tiny(task, tmp_path, monkeypatch):
    """The comparison as shipped, on the tiny model and a few steps of few examples."""
    shrunk = {"steps": 4, "batch_size": 6, "meta_batch_size": 6, "upper_start": 1}
    (tmp_path / "presets").mkdir()
    for path in PRESETS.glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        if "init_from" not in content:  # rows without a cold start have the shipped model
            content["model"] = str(task.model)
        kept = shrunk if path.stem.startswith("train") else {"steps": 4, "batch_size": 6}
        text = yaml.safe_dump(content | kept)
        (tmp_path / "presets" / path.name).write_text(text)
    sizes = replace(SIZES, dev_questions=12)  # some have right and wrong candidates
    monkeypatch.setattr(recipes.options.parse, "PRESETS", tmp_path / "presets")
    for name, drawn in DATA.items():
        small = replace(drawn, sizes=sizes)
        monkeypatch.setitem(recipes.comparison.runs.DATA, name, small)
    short = {"steps": 4, "eval_every": 2}
    few = {"gradient_features": 4}
    for names, options in (
        (("meta_only", "outcome_model", "from_base"), short),
        (("instance_net", "net_sanity"), few),
    ):
        for name in names:
            own = replace(ROWS[name], options={**ROWS[name].options, **options})
            monkeypatch.setitem(recipes.comparison.rows.ROWS, name, own)
    monkeypatch.setattr(recipes.comparison.statistics, "_RESAMPLES", 200)
    return CompareOptions(
        output_dir=str(tmp_path / "results"),
        work_dir=str(tmp_path / "work"),
        seeds=1,
        setting_seeds=1,
        # Without a ceiling: whether it is above No Selection here is chance.
        methods=(*(name for name in ROWS if name != "clean_oracle"), *VARIED),
        jobs=1,
        progress=False,
    )


def test_every_row(tiny, tmp_path, monkeypatch, capsys):
    report = compare(tiny)
    rows = set(report["runs"])
    assert rows == set(ROWS) - {"clean_oracle"}
    stopped = {f"{row}_dev_stopped" for row in rows.difference(ALONE)}
    shared = {"pass@1", "self_consistency", "pass@4"}
    assert set(report["rows"]) == rows | stopped | shared
    assert set(report["difference"]) == (rows | stopped | shared) - {
        "no_selection",
        "no_selection_dev_stopped",
    }
    assert rows <= set(NAMES)
    assert report == json.loads((tmp_path / "results" / "compare.json").read_text())
    assert "| PRM: No Selection |" in capsys.readouterr().out
    for name, runs in report["runs"].items():
        assert [run["seed"] for run in runs] == [0]
        mean = runs[0]["accuracy"]
        row = name if name in ALONE else f"{name}_dev_stopped"
        assert report["rows"][row] == pytest.approx(mean, abs=1e-4)
        assert report["best_of_k"][name][3] == pytest.approx(mean, abs=2e-4)  # all 4 candidates
        assert report["best_of_k"][name][0] == pytest.approx(report["rows"]["pass@1"], abs=2e-4)
    seed = tmp_path / "work" / "seed-0"
    assert model_bits(seed / "rows" / "cold_start") == model_bits(seed / "cold" / "data")
    for run in (seed / "rows").iterdir():
        check_rows_of(run)
    check_settings(report, seed)
    # A second call finds everything done, in other processes, too.
    monkeypatch.setattr(recipes.comparison.runs, "run_training", None)
    monkeypatch.setattr(recipes.comparison.runs, "run_cold_start", None)
    again = compare(replace(tiny, jobs=2))
    assert again == report


def test_each_seed_has_data_of_its_own(tiny, tmp_path):
    report = compare(replace(tiny, seeds=2, first_seed=3, methods=("no_selection",)))
    tests = [(tmp_path / "work" / f"seed-{n}" / "data" / "test.jsonl").read_bytes() for n in (3, 4)]
    digests = {
        str(n): hashlib.sha256(text).hexdigest() for n, text in zip((3, 4), tests, strict=True)
    }
    assert report["test_sha256"] == digests
    assert len(set(digests.values())) == 2
    runs = report["runs"]["no_selection"]
    assert [run["seed"] for run in runs] == [3, 4]
    mean = sum(run["accuracy"] for run in runs) / 2
    assert report["rows"]["no_selection_dev_stopped"] == pytest.approx(mean, abs=1e-4)


def check_settings(report, seed: Path) -> None:
    """Each differs from its row in what it names, and is compared on the same questions."""
    assert set(report["settings"]) == set(VARIED)
    base = report["runs"]["instance_table"][0]["accuracy"]
    for setting in report["settings"].values():
        assert setting["of"] == "instance_table"
        assert setting["per_seed"] == [setting["accuracy"]]
        assert setting["difference"] == pytest.approx(setting["accuracy"] - base, abs=1e-4)
    kept = {
        name: yaml.safe_load((seed / "rows" / name / "args.yaml").read_text())
        for name in ("instance_table", *VARIED)
    }
    usual = kept.pop("instance_table")
    differing = {
        name: {key for key in usual if key != "output_dir" and usual[key] != options[key]}
        for name, options in kept.items()
    }
    assert differing == {VARIED[0]: {"meta_file"}, VARIED[1]: {"aggregation"}}


def test_given_weights_follow_from_learned_ones(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes.train.training, "best_of", lambda scores: scores[-1])
    monkeypatch.setattr(
        recipes.train.dev_evaluation, "best_of", lambda scores: scores[-1]
    )  # whose weights are not those of the start
    names = ("no_selection", "shuffled_table", "small_loss", "bis")
    compare(replace(tiny, seeds=1, methods=names))
    seed = tmp_path / "work" / "seed-0"
    entries = read_lines(seed / "rows" / "instance_table" / "weights.jsonl")
    learned = {row["id"]: row["weight"] for row in entries}
    given = {
        name: {row["id"]: row["weight"] for row in read_lines(seed / "weights" / f"{name}.jsonl")}
        for name in names[1:]
    }
    assert all(list(weights) == list(learned) for weights in given.values())
    assert sorted(given["shuffled_table"].values()) == sorted(learned.values())
    assert given["shuffled_table"] != learned
    kept = sum(weight > 0.5 for weight in learned.values())
    assert kept > 0
    losses = {row["id"]: row["initial_loss"] for row in entries}
    shares = {
        row["id"]: sum(step["label"] == "+" for step in row["steps"]) / len(row["steps"])
        for row in read_lines(seed / "data" / "train.jsonl")
    }
    mixed = {name: share * (1 - share) for name, share in shares.items()}
    for name, rank in (("small_loss", {k: -v for k, v in losses.items()}), ("bis", mixed)):
        assert sum(given[name].values()) == kept
        best = sorted(rank, key=lambda key: -rank[key])[:kept]  # of equal ones the first
        assert {key for key, weight in given[name].items() if weight} == set(best)


@pytest.mark.parametrize("where", ["cold/data", "rows/no_selection"])
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
    for name in ("cold/data", "rows/no_selection"):
        bits = [model_bits(tmp_path / at / "seed-0" / name) for at in ("whole", "work")]
        assert bits[0] == bits[1]


def test_a_row_that_cannot_be_trained_does_not_keep_others_from_it(
    tiny, tmp_path, monkeypatch, capsys
):
    train, rows = recipes.comparison.runs.run_training, tmp_path / "work" / "seed-0" / "rows"

    def failing(options):
        if options.output_dir == str(rows / "base"):
            raise NonFiniteError("step 3: hypergradient_norm is nan")
        return train(options)

    monkeypatch.setattr(recipes.comparison.runs, "run_training", failing)
    with pytest.raises(StepError, match=r"seed 0 base: cannot be trained .* compare.json is not"):
        compare(replace(tiny, methods=("base", "cold_start")))
    assert (rows / "cold_start" / "results.json").exists()
    assert not (tmp_path / "results").exists()
    assert "seed 0 base: step 3: hypergradient_norm is nan" in capsys.readouterr().err


def test_unknown_rows_are_refused(tiny):
    with pytest.raises(OptionError, match="--methods: unknown 'nett'; expected among base, cold"):
        compare(replace(tiny, methods=("nett",)))


def test_settings_name_rows_and_data_sets_that_exist():
    assert {setting.of for setting in SETTINGS.values()} <= set(ROWS)
    assert not set(SETTINGS) & set(ROWS)
    for row in (*ROWS.values(), *(setting.row for setting in SETTINGS.values())):
        assert {name.partition("/")[0] for name in (row.train, row.meta)} <= set(DATA)
        assert row.start is None or row.start in DATA


def test_every_share_of_corruption_is_exact():
    for share in (20, 40, 60):
        mixture = DATA[f"noise-{share}"].mixture
        assert mixture.verified == pytest.approx(1 - share / 100)
        assert mixture.shares().sum() == pytest.approx(1)
        assert mixture.guideline / mixture.judge == pytest.approx(4.4)


def check_rows_of(run: Path) -> None:
    """The row of the last model is that of ``last/`` where the best dev step is another."""
    if not (run / "results.json").exists() or run.name.endswith("-last"):
        return
    chosen = json.loads((run / "results.json").read_text()).get("model_selection")
    if chosen is None:
        return
    dev = [row for row in read_lines(run / "log.jsonl") if row["phase"] == "dev"]
    top = max(row["best_of_n"] for row in dev)
    assert chosen["step"] == next(row["step"] for row in dev if row["best_of_n"] == top)
    scored = run.with_name(f"{run.name}-last")
    assert scored.exists() == (chosen["step"] != dev[-1]["step"])
    if scored.exists():
        assert model_bits(scored) == model_bits(run / "last")


class Killed(BaseException):
    """The end of a process that nothing catches."""
