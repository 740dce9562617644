"""What the README says can be run, runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from recipes.__main__ import main, make_parser
from recipes.evidence.smollm2.__main__ import table as check_table
from tests.tiny_task import task

__all__ = ["task"]

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_core_snippet_runs_and_its_audit_agrees():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    namespace: dict = {}
    exec(compile(snippet, "README.md", "exec"), namespace)
    assert namespace["info"].weights.shape == (64,)
    from bilevel import check_hypergradient

    solver, state = namespace["solver"], namespace["state"]
    assert solver.hypergradient.order == "lower-first"
    double = [
        {name: value.double() for name, value in params.items()}
        for params in (state.lower_params, state.upper_params)
    ]
    to_double = lambda batch: {  # noqa: E731
        name: value.double() if value.is_floating_point() else value
        for name, value in batch.items()
    }
    fresh = solver.init(*double)
    for _ in range(3):
        fresh, _ = solver.step(fresh, [to_double(namespace["train"])])
    check = check_hypergradient(
        solver, fresh, [to_double(namespace["train"])], to_double(namespace["clean"])
    )
    assert check, check.message


def test_every_command_line_parses():
    parts = re.split(r"^```(\w*)\n", README, flags=re.MULTILINE)
    # parts: text, language of an opening fence, its content, "" of the closing fence, text, ...
    blocks = parts[2::4]
    text = "\n".join(blocks).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith("bilevel-prm ")]
    assert len(lines) >= 3
    for line in lines:
        make_parser().parse_args(line.split("#")[0].split()[1:])


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"make ([a-z0-9-]+)", README))
    assert {"train-net", "test", "help"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("name", re.findall(r"\b([a-z_]+\.py)\b", README))
def test_files_of_the_tree_exist(name):
    packages = ("bilevel", "weighting", "prm", "recipes")
    assert any((ROOT / package / name).is_file() for package in packages), name


def test_results_are_those_that_were_written():
    """The table in the README is the one that `compare` made, digit for digit."""
    from recipes.evaluation.table import comparison_table

    path = ROOT / "results" / "compare.json"
    if not path.is_file():
        pytest.skip("results/compare.json is not there: make results writes it")
    assert comparison_table(json.loads(path.read_text())) in README


def commands_of(section: str) -> list[list[str]]:
    """Words of every command of the README's section of that name, in order."""
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    lines = blocks.replace("\\\n", " ").splitlines()
    return [line.split()[1:] for line in lines if line.startswith("bilevel-prm ")]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_users_files_become_selected_answers(task, tmp_path, monkeypatch):
    """The section's commands, word for word, but for the model and for shorter training."""
    shutil.copytree(task.data, tmp_path, dirs_exist_ok=True)
    candidates = lines_of(tmp_path / "test.jsonl")
    for row in candidates:
        del row["correct"], row["answer"]
        row["steps"] = [{"text": step["text"]} for step in row["steps"]]
    text = "".join(json.dumps(row) + "\n" for row in candidates)
    (tmp_path / "candidates.jsonl").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    short = ["--steps", "2", "--batch-size", "6", "--no-progress"]
    added = {
        "cold-start": [*short, "--draw", "6"],
        "train": [*short, "--upper-start", "1", "--meta-batch-size", "6"],
    }
    commands = commands_of("From your files to selected answers")
    assert [words[0] for words in commands] == [
        *("data", "cold-start", "train", "score", "select", "evaluate", "weigh")
    ]
    for command in commands:
        words = [str(task.model) if word.startswith("OpenGVLab/") else word for word in command]
        assert main([*words, *added.get(words[0], [])]) == 0, " ".join(words)
    scores, selected = lines_of(tmp_path / "scores.jsonl"), lines_of(tmp_path / "selected.jsonl")
    asked = dict.fromkeys(row["group"] for row in candidates)
    assert [row["group"] for row in selected] == list(asked)
    for best in selected:
        among = {r["id"]: r["scores"]["mean"] for r in scores if r["group"] == best["group"]}
        assert best["score"] == max(among.values()) == among[best["id"]]
        assert best["tied"] == [name for name, score in among.items() if score == best["score"]]


def test_the_check_with_real_weights_is_the_one_that_was_written():
    path = ROOT / "results" / "smollm2.json"
    if not path.is_file():
        pytest.skip("results/smollm2.json is not there: make check-smollm2 writes it")
    assert check_table(json.loads(path.read_text(encoding="utf-8"))) in README
