"""A model folder alone is enough to ask the model as it was trained, whatever the command."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from prm.conventions import FILE, Conventions, read_conventions
from prm.data.reader import read_jsonl
from prm.evaluation.step_benchmarks import best_threshold
from prm.models.model import load_prm
from prm.rewards.scorer import Scorer
from prm.scoring import score_examples
from recipes import commands
from recipes.embedded.vocabulary import SYSTEM_PROMPT
from recipes.models.loading import asked as asked_by
from recipes.models.loading import filled, load_model, read_examples
from recipes.options.base import PrmOptions
from recipes.options.parse import saved_options
from recipes.options.use import EvaluateOptions, ScoreOptions, SelectOptions, WeighOptions
from recipes.train.cold_start import run_cold_start
from recipes.train.training import run_training
from recipes.use.scores_file import read_scores, read_settings
from tests.tiny_task import read_lines

OWN = Conventions(
    plus_id=1, minus_id=2, system_prompt="judge", context="masked", max_patches=4, threshold=0.3
)


def asked(options, own=OWN):
    usage = own or Conventions(plus_id=1, minus_id=2)
    return asked_by(options, SimpleNamespace(conventions=own, usage=usage))


@pytest.fixture(scope="module")
def run(task, tmp_path_factory) -> Path:
    """A cold start with a prompt of its own, and a training that names none of it."""
    folder = tmp_path_factory.mktemp("runs")
    prompt = {"context": "gold", "system_prompt": SYSTEM_PROMPT, "max_patches": 2}
    cold = run_cold_start(task.cold_start(folder / "cold", probability="vocabulary", **prompt))
    options = task.train(
        folder / "train",
        init_from=str(cold / "model"),
        system_prompt=None,
        aggregation="min",
        dev_file=str(task.data / "dev.jsonl"),
    )
    return run_training(options)


def test_options_that_are_not_given_are_the_models():
    assert asked(PrmOptions()) == OWN
    assert asked(PrmOptions(context="masked", max_patches=4, system_prompt="judge")) == OWN
    assert asked(EvaluateOptions(file="x", aggregation="min")) == replace(OWN, aggregation="min")
    assert asked(EvaluateOptions(file="x", threshold=0.9)).threshold == 0.9


def test_without_conventions_the_options_and_their_defaults_count():
    default = Conventions(plus_id=1, minus_id=2, max_patches=6)
    assert asked(PrmOptions(), None) == default
    options = ScoreOptions(file="x", output="y", context="gold", probability="vocabulary")
    assert asked(options, None) == replace(default, context="gold", probability="vocabulary")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"context": "plus"}, '--context plus: runs/m/prm.json says context: "masked"'),
        ({"max_patches": 6}, "--max-patches 6: runs/m/prm.json says max_patches: 4"),
        ({"system_prompt": "x"}, '--system-prompt x: runs/m/prm.json says system_prompt: "judge"'),
        (
            {"probability": "vocabulary", "context": "gold"},
            '--context gold, --probability vocabulary: runs/m/prm.json says context: "masked", '
            'probability: "labels"',
        ),
    ],
)
def test_an_option_that_contradicts_the_model_is_refused(given, said):
    with pytest.raises(ValueError, match="leave the option out") as caught:
        asked(ScoreOptions(model="runs/m", file="x", output="y", **given))
    assert said in str(caught.value)


def test_training_sets_the_conventions_anew(task, tmp_path):
    options = task.train(tmp_path, context="gold", aggregation="last")
    found = asked(options)
    assert found == replace(
        OWN, context="gold", aggregation="last", system_prompt=SYSTEM_PROMPT, threshold=0.5
    )
    assert filled(options, found).max_patches == 4
    assert asked(filled(options, found), found) == found


def test_labels_of_rows_that_are_judged_stay_hidden():
    gold = replace(OWN, context="gold")
    score = ScoreOptions(file="x", output="y")
    assert asked(score, gold).context == "plus"
    assert asked(replace(score, context="gold"), gold).context == "gold"
    assert asked(replace(score, context="plus"), gold).context == "plus"
    assert asked(WeighOptions(file="x", output="y"), gold).context == "gold"
    with pytest.raises(ValueError, match='says context: "gold"'):
        asked(replace(score, context="masked"), gold)


def test_both_kinds_of_runs_write_what_they_trained_with(run):
    prm = load_prm(run / "model")
    cold = read_conventions(run.parent / "cold" / "model" / FILE)
    assert cold == Conventions(
        plus_id=prm.plus_id,
        minus_id=prm.minus_id,
        system_prompt=SYSTEM_PROMPT,
        context="gold",
        max_patches=2,
        probability="vocabulary",
    )
    found = read_conventions(run / "model" / FILE)
    assert replace(found, threshold=0.5) == replace(cold, probability="labels", aggregation="min")
    args = yaml.safe_load((run / "args.yaml").read_text())
    assert (args["context"], args["max_patches"]) == ("gold", 2)
    assert args["system_prompt"] == SYSTEM_PROMPT


def test_the_threshold_is_the_best_on_the_development_set(run, task):
    options = task.train(run, dev_file=str(task.data / "dev.jsonl"), context="gold")
    prm, params = load_model(replace(options, model=str(run / "model"), max_patches=None))
    data = read_examples(prm, options, options.data.dev_file)
    truth, predicted = [], []
    for row in data.encoded:
        (scores,) = score_examples(prm, params, [row], data.collator, 1)
        for step, score in zip(row.example.steps, scores.tolist(), strict=True):
            if step.label is not None:
                truth.append(step.label > 0.5)
                predicted.append(score)
    expected, _ = best_threshold(truth, predicted)
    assert read_conventions(run / "model" / FILE).threshold == pytest.approx(expected, abs=1e-6)


@pytest.fixture
def alone(run, tmp_path) -> Path:
    """The model without its run."""
    return Path(shutil.copytree(run / "model", tmp_path / "alone"))


def test_commands_need_the_folder_alone(alone, task, tmp_path, capsys):
    """The scores are those of options that say it all, for a model that does not."""
    own = read_conventions(alone / FILE)
    bare = Path(shutil.copytree(alone, tmp_path / "bare"))
    (bare / FILE).unlink()
    common = {"file": str(task.data / "test.jsonl"), "eval_batch_size": 5}
    score = ScoreOptions(model=str(alone), output=str(tmp_path / "a.jsonl"), **common)
    said = {"max_patches": 2, "system_prompt": SYSTEM_PROMPT, "context": "plus"}
    other = ScoreOptions(model=str(bare), output=str(tmp_path / "b.jsonl"), **common, **said)
    assert commands.run("score", score) == commands.run("score", other) == 0
    assert Path(score.output).read_bytes() == Path(other.output).read_bytes()
    assert read_settings(Path(score.output))["use"] == {
        "aggregation": "min",
        "threshold": own.threshold,
    }

    select = SelectOptions(scores=score.output, output=str(tmp_path / "best.jsonl"))
    assert commands.run("select", select) == 0
    lowest = {row.id: min(row.step_scores) for row in read_scores(Path(score.output))}
    for best in read_lines(tmp_path / "best.jsonl"):
        assert best["score"] == lowest[best["id"]]
    by_mean = replace(select, aggregation="mean", overwrite=True)
    assert commands.run("select", by_mean) == 0
    assert "best mean of" in capsys.readouterr().out

    for asks in ({"scores": score.output}, {"model": str(alone), "eval_batch_size": 5}):
        figures = tmp_path / "figures.json"
        evaluate = EvaluateOptions(file=common["file"], output=str(figures), overwrite=True, **asks)
        assert commands.run("evaluate", evaluate) == 0
        found = json.loads(figures.read_text())
        assert (found["aggregation"], found["threshold"]) == ("min", own.threshold)


@pytest.mark.parametrize("size", [2, 7])
def test_a_program_gets_the_bits_of_the_command(alone, task, tmp_path, size):
    """Of several windows of batches, and of one."""
    options = ScoreOptions(
        model=str(alone),
        file=str(task.data / "test.jsonl"),
        output=str(tmp_path / "a.jsonl"),
        eval_batch_size=size,
        tokens_per_batch=700,
    )
    assert commands.run("score", options) == 0
    rows = read_scores(Path(options.output))
    scorer = Scorer.from_pretrained(alone, batch_size=size, tokens_per_batch=700)
    examples = list(read_jsonl(options.file))
    solutions = [[step.text for step in example.steps] for example in examples]
    images = [example.images for example in examples]
    judged = scorer.judge([example.question for example in examples], solutions, images)
    assert [one.step_scores for one in judged] == [row.step_scores for row in rows]
    assert [one.score for one in judged] == [row.scores["min"] for row in rows]
    first = [n for n, row in enumerate(rows) if row.group == rows[0].group]
    order = scorer.rank(examples[0].question, [solutions[n] for n in first], images[0])
    scores = [judged[n].score for n in first]
    assert [scores[n] for n in order] == pytest.approx(sorted(scores, reverse=True), abs=1e-6)
    defaults = ScoreOptions(file="x", output="y")
    usual = Scorer(scorer.prm)
    assert usual.batch_size == defaults.eval_batch_size
    assert usual.tokens_per_batch == defaults.tokens_per_batch


@pytest.mark.parametrize("command", ["score", "evaluate"])
def test_a_contradiction_ends_the_command(alone, task, tmp_path, capsys, command):
    kind, more = ScoreOptions, {"output": str(tmp_path / "a.jsonl")}
    if command == "evaluate":
        kind, more = EvaluateOptions, {}
    options = kind(model=str(alone), file=str(task.data / "dev.jsonl"), max_patches=6, **more)
    assert commands.run(command, options) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"--max-patches 6: {alone / FILE} says max_patches: 2, as the model was trained" in line


def test_a_newer_file_ends_the_command(alone, task, tmp_path, capsys):
    content = json.loads((alone / FILE).read_text()) | {"format": 2}
    (alone / FILE).write_text(json.dumps(content))
    options = ScoreOptions(
        model=str(alone), file=str(task.data / "dev.jsonl"), output=str(tmp_path / "a.jsonl")
    )
    assert commands.run("score", options) == 2
    said = capsys.readouterr().err
    assert f"{alone / FILE}: field format: expected 1, the newest format that this version" in said


def test_settings_that_name_no_aggregation_are_refused(alone, task, tmp_path, capsys):
    scores = tmp_path / "a.jsonl"
    options = ScoreOptions(model=str(alone), file=str(task.data / "dev.jsonl"), output=str(scores))
    assert commands.run("score", options) == 0
    path = scores.with_name("a.jsonl.settings.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use": {"aggregation": "median"}}))
    select = SelectOptions(scores=str(scores), output=str(tmp_path / "best.jsonl"))
    assert commands.run("select", select) == 1
    assert "settings.json: field use: expected aggregation and" in capsys.readouterr().err


def test_an_unfinished_run_is_known_though_its_options_were_the_models(run, task):
    """Given again without the options that the model's folder says, it is the same run."""
    from recipes.run.directory import _differences

    there = saved_options(run)
    again = task.train(
        run,
        init_from=str(run.parent / "cold" / "model"),
        system_prompt=None,
        aggregation="min",
        dev_file=str(task.data / "dev.jsonl"),
    )
    assert _differences(there, again) == ([], [])
    differ, _ = _differences(there, replace(again, context="plus"))
    assert differ == ["--context plus, there gold"]


def test_weights_of_a_net_come_from_the_prompt_of_its_run(run, task, tmp_path, capsys):
    """The model of the run needs no option; one that is asked otherwise is refused."""
    common = {
        "weighting": str(run / "weighting"),
        "file": str(task.data / "train.jsonl"),
        "eval_batch_size": 6,
    }
    options = WeighOptions(model=str(run / "model"), output=str(tmp_path / "w.jsonl"), **common)
    assert commands.run("weigh", options) == 0
    found = [row["weight"] for row in read_lines(tmp_path / "w.jsonl")]
    expected = [row["weight"] for row in read_lines(run / "weights.jsonl")]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=0)
    other = replace(options, model=str(task.model), output=str(tmp_path / "v.jsonl"))
    assert commands.run("weigh", other) == 2
    assert "--context plus (the run: gold)" in capsys.readouterr().err
