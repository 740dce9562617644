"""Questions shared between what something is tuned on and what it is judged by."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from prm.schema import Step, StepExample
from recipes import commands
from recipes.evaluation.leaks import find_leak, refuse_leak
from recipes.options.use import EvaluateOptions
from recipes.options.values import OptionError
from tests.tiny_task import read_lines


def example(name: str, question: str, *images: Path) -> StepExample:
    return StepExample(name, question, images, (Step("s"),))


@pytest.fixture
def picture(tmp_path):
    def make(name: str, content: str) -> Path:
        (tmp_path / name).write_text(content)
        return tmp_path / name

    return make


META, TEST = Path("meta.jsonl"), Path("test.jsonl")


def test_nothing_in_common(picture):
    first = [example("a", "What?", picture("1", "x")), example("b", "How?")]
    second = [example("c", "What?", picture("2", "y")), example("d", "Why?"), example("e", "What?")]
    found = find_leak(first, second, META, TEST)
    assert not found
    assert (found.same_file, found.ids, found.questions) == (False, (), ())
    refuse_leak(found, "a", "b", sanity_check=False)


def test_renamed_questions_are_found_by_words_and_pictures(picture):
    first = [example("a", "What is  it?", picture("1", "x"), picture("2", "y"))]
    second = [example("b", "what is it?", picture("3", "x"), picture("4", "y"))]
    found = find_leak(first, second, META, TEST)
    assert found.questions == ("What is  it?",)
    assert str(found) == "shares 1 questions, for example 'What is  it?'"
    swapped = [example("b", "what is it?", picture("4", "y"), picture("3", "x"))]
    assert not find_leak(first, swapped, META, TEST)


@pytest.mark.parametrize("other", ["cafe\u0301  ?", "CAF\u00c9 ?", "Caf\u00e9 ?\u200b"])
def test_the_form_of_the_words_does_not_hide_a_leak(other):
    assert find_leak([example("a", "Caf\u00e9 ?")], [example("b", other)], META, TEST).questions


def test_pictures_are_read_only_where_words_agree():
    first = [example("a", "What?", Path("nowhere.png"))]
    assert not find_leak(first, [example("b", "How?", Path("gone.png"))], META, TEST)


def test_same_file_and_same_ids():
    first, second = [example("a", "What?")], [example("a", "How?")]
    assert str(find_leak(first, second, META, TEST)) == "shares 1 ids, for example 'a'"
    assert str(find_leak(first, first, META, Path("./meta.jsonl"))) == "is the same file"


def test_a_leak_is_refused_unless_marked():
    found = find_leak([example("a", "What?")], [example("b", "What?")], META, TEST)
    with pytest.raises(OptionError, match=r"--meta-file m shares 1 questions.*--sanity-check"):
        refuse_leak(found, "--meta-file m", "--test-file t", sanity_check=False)
    refuse_leak(found, "--meta-file m", "--test-file t", sanity_check=True)


def test_a_run_tuned_on_its_test_set_is_labelled(task, tmp_path, capsys):
    options = task.train(
        tmp_path / "run", weighting="table", test_file=str(task.data / "meta.jsonl")
    )
    assert commands.run("train", options) == 2
    assert "meta.jsonl is the same file with --test-file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    marked = task.train(
        tmp_path / "run",
        weighting="table",
        test_file=str(task.data / "meta.jsonl"),
        sanity_check=True,
    )
    assert commands.run("train", marked) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["sanity_check"] is True
    assert "instance_table_sanity_check" in results["rows"]
    assert "PRM: Instance Table, SANITY CHECK" in capsys.readouterr().out
    question = read_lines(tmp_path / "run" / "test_questions.jsonl")[0]
    assert "instance_table_sanity_check" in question


@pytest.fixture
def evaluate(task, tmp_path):
    """Evaluate a model that lies in a run whose meta set is ``meta``."""
    model = tmp_path / "run" / "model"
    shutil.copytree(task.model, model)

    def run(meta: Path, **more):
        (tmp_path / "run" / "args.yaml").write_text(yaml.safe_dump({"meta_file": str(meta)}))
        given = {"model": str(model), "file": str(task.data / "test.jsonl")} | more
        options = EvaluateOptions(
            output=str(tmp_path / "out.json"),
            overwrite=True,
            system_prompt="judge each step",
            **given,
        )
        return commands.run("evaluate", options), tmp_path / "out.json"

    return run


def test_the_meta_set_of_a_models_run_is_remembered(task, evaluate, capsys):
    status, _ = evaluate(task.data / "test.jsonl")
    assert status == 2
    assert "meta set " in (said := capsys.readouterr().err)
    assert "is the same file with --file" in said
    status, output = evaluate(task.data / "test.jsonl", sanity_check=True)
    assert status == 0
    results = json.loads(output.read_text())
    assert "prm_sanity_check" in results["rows"]
    assert results["sanity_check"] is True
    assert len(results["tuned_on_these_questions"]) == 1
    assert "SANITY CHECK, an upper bound: meta set" in capsys.readouterr().out


def test_a_meta_set_that_is_gone_is_said(task, evaluate, tmp_path, capsys):
    assert evaluate(tmp_path / "gone.jsonl")[0] == 0
    assert "gone.jsonl, the meta set of the model's run, is not there" in capsys.readouterr().out
    assert evaluate(task.data / "meta.jsonl")[0] == 0
    assert evaluate(tmp_path / "gone.jsonl", meta_file=str(task.data / "test.jsonl"))[0] == 2


def test_a_dev_set_is_no_test_set(task, evaluate, capsys):
    test = str(task.data / "test.jsonl")
    assert evaluate(task.data / "meta.jsonl", dev=test)[0] == 2
    assert f"--dev {test} is the same file with --file {test}" in capsys.readouterr().err
