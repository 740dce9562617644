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


def record(path):
    """Process id, host and start of the process in a lock."""
    pid, host, started = (path / "lock").read_text().splitlines()
    return int(pid), host, int(started)


def write_record(path, pid, host, started):
    (path / "lock").write_text(f"{pid}\n{host}\n{started}\n")


def write_old_record(path, pid):
    """A lock as version 0.1.0 wrote it."""
    holder = {"pid": pid, "host": socket.gethostname(), "since": "2026-11-27", "started": "1"}
    (path / "lock").write_text(json.dumps(holder) + "\n")


def test_a_lock_of_the_first_version_is_understood(tmp_path, capsys):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write_old_record(tmp_path, os.getpid())
    assert at_work(tmp_path)
    held = f"process {os.getpid()} on {socket.gethostname()}, "
    with pytest.raises(OptionError, match=held), locked(tmp_path):
        pass
    write_old_record(tmp_path, ended.pid)
    assert not at_work(tmp_path)
    with locked(tmp_path):
        assert f"killed run (process {ended.pid} on " in capsys.readouterr().out
        assert record(tmp_path)[0] == os.getpid()


def test_a_lock_that_cannot_be_examined_is_respected(tmp_path, monkeypatch):
    write_record(tmp_path, 2**31 - 1, socket.gethostname(), 1)
    assert not at_work(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    assert at_work(tmp_path)


def test_the_lock_says_who_and_is_removed(tmp_path):
    with locked(tmp_path):
        pid, host, _ = record(tmp_path)
        assert (pid, host.partition("?")[0]) == (os.getpid(), socket.gethostname())
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
    assert record(tmp_path)[0] == holder.pid
    holder.communicate("")
    assert not (tmp_path / "lock").exists()


def test_a_file_has_a_lock_of_its_own(tmp_path):
    file = tmp_path / "made" / "scores.jsonl"
    with locked(file):
        assert [path.name for path in file.parent.iterdir()] == ["scores.jsonl.lock"]
        with locked(file.with_name("other.jsonl")):
            assert len(list(file.parent.iterdir())) == 2
        with pytest.raises(OptionError) as refused, locked(file):
            pass
    assert str(refused.value).startswith(
        f"{file}: another process writes this file (process {os.getpid()} on "
    )
    assert str(refused.value).endswith(f"if it is gone, remove {file}.lock")
    assert list(file.parent.iterdir()) == []


@pytest.mark.parametrize("waited_for", [True, False])
def test_a_killed_one_is_taken_over(tmp_path, holder, capsys, waited_for):
    holder.kill()
    if waited_for:
        holder.wait()
    else:  # a process that ended, but whose parent has not looked: it still has its number
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    with locked(tmp_path):
        assert record(tmp_path)[0] == os.getpid()
    assert capsys.readouterr().out.startswith(
        f"{tmp_path}: took over the lock of a killed run (process {holder.pid} on "
    )


def test_one_that_is_removed_while_we_look_is_none(tmp_path, monkeypatch):
    """Its owner ended between the look and the reading."""
    monkeypatch.setattr(Path, "exists", lambda path: True)
    assert not at_work(tmp_path)
    with locked(tmp_path):
        assert record(tmp_path)[0] == os.getpid()


def test_the_same_number_with_another_start_is_another_process(tmp_path, capsys):
    with locked(tmp_path):
        pid, host, started = record(tmp_path)
    write_record(tmp_path, pid, host, started - 1)
    assert not at_work(tmp_path)
    with locked(tmp_path):
        assert record(tmp_path) == (pid, host, started)
    assert f"took over the lock of a killed run (process {pid} on " in capsys.readouterr().out
    write_record(tmp_path, pid, host, started)
    assert at_work(tmp_path)
    with pytest.raises(OptionError), locked(tmp_path):
        pass


def test_looking_writes_nothing_into_the_directory(tmp_path, holder):
    assert at_work(tmp_path)
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    before = record(tmp_path), tmp_path.stat().st_mtime_ns
    assert not at_work(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    assert (record(tmp_path), tmp_path.stat().st_mtime_ns) == before


def test_one_that_starts_after_we_looked_is_refused_too(tmp_path, monkeypatch):
    """Where a file system has no locks on directories, two may look before one of them writes."""
    monkeypatch.setattr("recipes.run.lock._is_held", lambda record: False)
    monkeypatch.setattr("filelock.SoftFileLock.break_lock", lambda lock: None)
    write_record(tmp_path, 1, "elsewhere", 1)
    refused = pytest.raises(OptionError, match=r"\(process 1 on elsewhere, since .*\)")
    with refused, locked(tmp_path):
        pass


@pytest.mark.parametrize(
    ("text", "holder"),
    [
        ("1\nelsewhere\n", "process 1 on elsewhere, since 2001-09-09"),
        ("1\nelsewhere\n7\n", "process 1 on elsewhere, since 2001-09-09"),
        ("7\nelsewhere?pidns-f0000000\n", "process 7 on elsewhere, since 2001-09-09"),
        ("", "its lock cannot be read"),
        ("7", "its lock cannot be read"),
        ("\xff\n\n\n\n", "its lock cannot be read"),
        (json.dumps({"pid": 1, "host": "elsewhere"}), "process 1 on elsewhere, since 2001-09-09"),
    ],
)
def test_what_cannot_be_checked_is_respected(tmp_path, text, holder):
    (tmp_path / "lock").write_text(text, encoding="latin1")
    os.utime(tmp_path / "lock", (10**9, 10**9))
    refused = pytest.raises(OptionError, match=rf"works in this run directory \({holder}")
    with refused, locked(tmp_path):
        pass
    assert at_work(tmp_path)
    assert (tmp_path / "lock").read_text(encoding="latin1") == text


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
