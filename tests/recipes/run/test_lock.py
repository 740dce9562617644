"""One process per run directory, and a killed one does not block the next."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.options.values import OptionError
from recipes.run.directory import free_directory
from recipes.run.lock import at_work, locked
from recipes.train.training import run_training

_HOLD = """
import sys
from pathlib import Path
from recipes.run.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of ``tmp_path``."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def content(path):
    return json.loads((path / "lock").read_text())


def test_the_lock_says_who_and_is_removed(tmp_path):
    with locked(tmp_path):
        found = content(tmp_path)
        assert (found["pid"], found["host"]) == (os.getpid(), socket.gethostname())
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_is_refused(tmp_path, holder):
    with pytest.raises(OptionError) as refused, locked(tmp_path):
        pass
    assert str(refused.value).startswith(
        f"{tmp_path}: another process works in this run directory (process {holder.pid} on "
        f"{socket.gethostname()}, since "
    )
    assert str(refused.value).endswith(f"if it is gone, remove {tmp_path / 'lock'}")
    assert content(tmp_path)["pid"] == holder.pid
    holder.communicate("")
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("waited_for", [True, False])
def test_a_killed_one_is_taken_over(tmp_path, holder, capsys, waited_for):
    holder.kill()
    if waited_for:
        holder.wait()
    else:  # a process that ended, but whose parent has not looked: it still has its number
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    with locked(tmp_path):
        assert content(tmp_path)["pid"] == os.getpid()
    assert capsys.readouterr().out.startswith(
        f"{tmp_path}: took over the lock of a killed run (process {holder.pid} on "
    )


def test_one_that_is_removed_while_we_look_is_none(tmp_path, monkeypatch):
    """Its owner ended between the look and the reading."""
    monkeypatch.setattr(Path, "exists", lambda path: True)
    assert not at_work(tmp_path)
    with locked(tmp_path):
        assert content(tmp_path)["pid"] == os.getpid()


def test_the_same_number_with_another_start_is_another_process(tmp_path):
    with locked(tmp_path):
        mine = content(tmp_path)
    assert mine["started"] is not None
    (tmp_path / "lock").write_text(json.dumps(mine | {"started": "1"}))
    with locked(tmp_path):
        assert content(tmp_path) == mine | {"since": content(tmp_path)["since"]}
    (tmp_path / "lock").write_text(json.dumps(mine))
    with pytest.raises(OptionError), locked(tmp_path):
        pass


@pytest.mark.parametrize(
    "text", [json.dumps({"pid": 1, "host": "elsewhere", "since": "x"}), "", "{}", "[1]"]
)
def test_what_cannot_be_checked_is_respected(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    refused = pytest.raises(OptionError, match="another process works in this run directory")
    with refused, locked(tmp_path):
        pass
    assert (tmp_path / "lock").read_text() == text


def test_two_runs_into_one_directory(task, tmp_path, holder):
    with pytest.raises(OptionError, match="another process works in this run directory"):
        run_training(task.train(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"lock"}


def test_what_a_run_leaves_that_was_killed_at_its_start_is_nothing(task, tmp_path):
    for name in ("env.json", "args.yaml.tmp", "lock.tmp"):
        (tmp_path / name).write_text("half")
    assert free_directory(tmp_path, "number") == tmp_path
    run_training(task.train(tmp_path, steps=0, weighting="none", test_file=None))
    assert (tmp_path / "results.json").exists()
