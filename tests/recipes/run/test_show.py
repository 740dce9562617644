"""What a run directory says of its run, without torch and without trust in its files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.__main__ import main
from recipes.options.values import OptionError
from recipes.run.lock import locked
from recipes.run.provenance import data_fingerprints, fingerprint, git_state
from recipes.run.show import described, run_state, runs_below

LINE = {"phase": "instance_net", "step": 30, "lower_loss": 0.123456, "upper_lr": 0.5}


@pytest.fixture
def run(tmp_path) -> Path:
    path = tmp_path / "runs" / "a"
    (path / "checkpoints" / "step-20").mkdir(parents=True)
    (path / "checkpoints" / "step-100.tmp").mkdir()
    (path / "checkpoints" / "step-3").mkdir()
    (path / "args.yaml").write_text("steps: 40\nweighting: net\n")
    lines = json.dumps({**LINE, "step": 20}) + "\n" + json.dumps(LINE) + "\n" + '{"step": 4'
    (path / "log.jsonl").write_text(lines)
    return path


def test_a_stopped_run(run):
    found = run_state(run)
    assert (found.kind, found.state, found.steps, found.logged) == ("train", "stopped", 40, 30)
    assert (found.checkpoint, found.last_line) == (20, LINE)
    assert found.resume == f"bilevel-prm train --resume {run}"
    text = described(found)
    assert "30 of 40" in text
    assert "after step 20" in text
    assert "lower_loss 0.1235" in text
    assert text.endswith(found.resume)


def test_complete_at_work_and_cold_start(run):
    with locked(run):
        assert run_state(run).state == "at work"
    (run / "results.json").write_text(json.dumps({"rows": {"pass@1": 0.5}}))
    found = run_state(run)
    assert (found.state, found.resume, found.results) == ("complete", None, {"pass@1": 0.5})
    assert "pass@1 0.5" in described(found)
    (run / "args.yaml").write_text("steps: 40\ndraw: 3\n")
    assert run_state(run).kind == "cold-start"


def test_a_run_that_ends_while_we_look_is_not_called_stopped(run, monkeypatch):
    """Its results are written and its lock is removed between two looks."""

    def ends(directory):
        (directory / "results.json").write_text(json.dumps({"rows": {}}))
        return False

    monkeypatch.setattr("recipes.run.show.at_work", ends)
    assert run_state(run).state == "complete"


def test_a_run_that_was_killed_at_once(tmp_path):
    (tmp_path / "args.yaml").write_text("steps: 40\n")
    found = run_state(tmp_path)
    assert (found.logged, found.checkpoint, found.last_line) == (0, None, None)
    assert described(found).endswith("(from the beginning)")


@pytest.mark.parametrize(
    "content", [b"", b"\xff\n", b"[1]\n", b"[" * 9999 + b"\n", b'{"step": []}\n']
)
def test_damaged_files_do_not_matter(run, content):
    for name in ("log.jsonl", "results.json", "env.json"):
        (run / name).write_bytes(content)
    found = run_state(run)
    assert found.logged == 0
    assert described(found)


def test_a_folder_that_is_named_like_a_checkpoint_does_not_matter(run):
    for name in ("step-²", "step-none"):
        (run / "checkpoints" / name).mkdir(parents=True)
    assert run_state(run).checkpoint == 20


def test_commands(run, capsys, tmp_path):
    assert main(["runs", "show", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["last_line"] == LINE
    assert main(["runs", "show", str(run)]) == 0
    assert "checkpoint  after step 20" in capsys.readouterr().out
    assert main(["runs", "list", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [
        "stopped", "30", "of", "40", "train", str(run),
    ]  # fmt: skip
    assert main(["runs", "list", str(tmp_path), "--json"]) == 0
    assert [row["directory"] for row in json.loads(capsys.readouterr().out)] == [str(run)]
    assert runs_below(run) == [run]
    assert main(["runs", "list", str(tmp_path / "none")]) == 2
    assert "none: no such folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["runs", "list", str(tmp_path / "empty")]) == 0
    assert "no runs" in capsys.readouterr().out
    assert main(["runs", "show", str(tmp_path)]) == 2
    assert "no args.yaml" in capsys.readouterr().err
    with pytest.raises(OptionError):
        run_state(tmp_path)


def test_torch_is_not_imported(run):
    call = f"main(['runs', 'show', {str(run)!r}])"
    code = f"import sys; from recipes.__main__ import main; {call}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_fingerprints(tmp_path, monkeypatch):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"a\nb")
    monkeypatch.setattr("recipes.run.provenance._BLOCK", 4)
    assert fingerprint(path)["lines"] == 2
    assert fingerprint(path)["bytes"] == 3
    ends = set()
    for content in (b"aaaa\n" * 9, b"aaab\n" * 9, b"aaaa\n" * 8, b"aaaa\n" * 8 + b"aaab\n", b""):
        path.write_bytes(content)
        found = fingerprint(path)
        assert (found["bytes"], found["lines"]) == (len(content), content.count(b"\n"))
        ends.add(found["sha256_of_ends"])
    assert len(ends) == 4  # the ends of nine and of eight equal lines are the same; sizes differ

    given = {"train_file": str(path), "meta_file": None, "seed": 3}
    assert list(data_fingerprints(given)) == ["train_file"]


def test_git_state(tmp_path):
    assert git_state(tmp_path) is None

    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "a")
    clean = git_state(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {**clean, "dirty": True}
    (tmp_path / "inside").mkdir()
    assert git_state(tmp_path / "inside") is None
