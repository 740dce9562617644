"""``evaluate`` with scores that are there, with a dev set, and with options that do nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import recipes.use.evaluate
from recipes import commands
from recipes.embedded.vocabulary import SYSTEM_PROMPT
from recipes.options.use import EvaluateOptions, ScoreOptions
from recipes.use.score import run_score


@pytest.fixture(scope="module")
def scores(task, tmp_path_factory):
    """Scores files of dev and test."""
    folder = tmp_path_factory.mktemp("scores")

    def score(name: str) -> str:
        options = ScoreOptions(
            model=str(task.model),
            file=str(task.data / f"{name}.jsonl"),
            output=str(folder / f"{name}.jsonl"),
            system_prompt=SYSTEM_PROMPT,
        )
        return str(run_score(options))

    return {name: score(name) for name in ("dev", "test")}


@pytest.fixture
def evaluate(task, tmp_path):
    def run(**given) -> dict:
        output = tmp_path / "out.json"
        given = {"file": str(task.data / "test.jsonl"), "output": str(output)} | given
        given["overwrite"] = True
        assert commands.run("evaluate", EvaluateOptions(**given)) == 0
        return json.loads(output.read_text())

    return run


def test_scores_that_are_there_give_the_same_figures(task, evaluate, scores, monkeypatch):
    dev = str(task.data / "dev.jsonl")
    asked = {"model": str(task.model), "system_prompt": SYSTEM_PROMPT}
    computed = evaluate(**asked, dev=dev)
    assert computed["dev"]["file"] == dev
    monkeypatch.setattr(recipes.use.evaluate, "load_model", None)  # no model is needed now
    read = evaluate(scores=scores["test"], dev=dev, dev_scores=scores["dev"])
    assert read == computed
    plain = evaluate(scores=scores["test"])
    assert (plain["dev"], plain["aggregation"], plain["threshold"]) == (None, "mean", 0.5)


def test_the_test_set_does_not_choose(task, evaluate, scores, tmp_path):
    asked = {"dev": str(task.data / "dev.jsonl"), "dev_scores": scores["dev"]}
    turned = tmp_path / "turned.jsonl"
    lines = [json.loads(line) for line in Path(scores["test"]).read_text().splitlines()]
    for line in lines:
        line["step_scores"] = [1 - score for score in line["step_scores"]]
    turned.write_text("".join(json.dumps(line) + "\n" for line in lines))
    as_is, other = (evaluate(scores=path, **asked) for path in (scores["test"], str(turned)))
    assert as_is["rows"] != other["rows"]
    for name in ("aggregation", "threshold", "dev"):
        assert as_is[name] == other[name]


def test_a_baseline_is_compared_on_the_same_questions(evaluate, scores):
    found = evaluate(scores=scores["test"], baseline_scores=scores["test"])
    assert found["rows"]["baseline"] == found["rows"]["prm"]
    entry = found["difference"]["baseline"]
    assert (entry["difference"], entry["better"], entry["mcnemar_p"]) == (0.0, 0, 1.0)


@pytest.mark.parametrize(
    ("given", "status", "message"),
    [
        ({"dev_scores": "{dev}"}, 2, "--dev-scores has no effect without --dev"),
        ({"dev": "{data}/dev.jsonl", "aggregation": "min"}, 2, "--aggregation: no effect with --d"),
        ({"dev": "{data}/dev.jsonl", "threshold": 0.25}, 2, "--threshold: no effect with --dev"),
        ({"context": "gold"}, 2, "--context: no effect with --scores"),
        ({"model": "x", "probability": "vocabulary"}, 2, "--model, --probability: no effect"),
        ({"threshold": 1.5}, 2, "--threshold: expected a number in [0, 1], found 1.5"),
        ({"scores": "{dev}"}, 1, "expected scores of the 20 solutions of"),
        ({"file": "./none.jsonl"}, 2, "./none.jsonl: no such file"),
        ({"scores": "./none.jsonl"}, 2, "none.jsonl: no such file; write the file with"),
        ({"file": "{data}/train.jsonl"}, 1, ":1: field answer: expected a value"),
    ],
)
def test_what_cannot_be_is_refused(task, scores, capsys, given, status, message):
    words = {**scores, "data": task.data}
    given = {k: v.format(**words) if isinstance(v, str) else v for k, v in given.items()}
    base = {"file": str(task.data / "test.jsonl"), "scores": scores["test"]}
    assert commands.run("evaluate", EvaluateOptions(**{**base, **given})) == status
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_scores_of_changed_solutions_are_refused(task, scores, tmp_path, capsys):
    lines = Path(scores["test"]).read_text().splitlines()
    first = json.loads(lines[0])
    first["step_scores"] = first["step_scores"][:-1]
    cut = tmp_path / "cut.jsonl"
    cut.write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    options = EvaluateOptions(file=str(task.data / "test.jsonl"), scores=str(cut))
    assert commands.run("evaluate", options) == 1
    assert "one per step, found 4; score this file again" in capsys.readouterr().err


def test_another_prompt_than_the_runs_is_said(task, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(task.model)
    (run / "args.yaml").write_text("context: gold\nsystem_prompt: judge\nmax_patches: 6\n")
    options = ScoreOptions(
        model=str(run / "model"),
        file=str(task.data / "dev.jsonl"),
        output=str(tmp_path / "scores.jsonl"),
        system_prompt="judge",
    )
    assert commands.run("score", options) == 0
    said = capsys.readouterr().err
    assert f"note: {run / 'args.yaml'} has another prompt: --context plus (the run: gold)\n" in said
