"""A write that fails, or is cut short, leaves the old file and nothing else."""

from __future__ import annotations

import errno
import json
import os

import pytest

import prm.files
from recipes.run.files import (
    complete_directory,
    remove_directory,
    remove_unfinished,
    write_json,
    write_text,
)


def fails(*arguments, **more):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def order(monkeypatch):
    """Which files reach the disk and which are renamed, in order."""
    events = []
    fsync, replace = os.fsync, os.replace

    def flushed(handle):
        events.append(f"flush {os.path.basename(os.readlink(f'/proc/self/fd/{handle}'))}")
        fsync(handle)

    def renamed(source, target):
        events.append(f"rename {os.path.basename(source)} {os.path.basename(target)}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    return events


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, order):
    path = tmp_path / "made" / "file.txt"
    write_text(path, "α\n")
    write_text(path, "β\n")
    assert path.read_bytes() == "β\n".encode()
    assert order == ["flush file.txt", "rename file.txt file.txt", "flush made"] * 2
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("existed", [True, False])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, call, existed):
    path = tmp_path / "file.txt"
    if existed:
        path.write_text("old")
    monkeypatch.setattr(os, call, fails)
    with pytest.raises(OSError, match="No space left on device"):
        write_text(path, "new")
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["old"] * existed


def test_what_a_killed_writer_left_is_removed_where_only_we_write(tmp_path):
    for name in (".step-4.x1y2.unfinished", ".step-8.z.unfinished", "step-4", ".other.unfinished"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state").write_text("half")
    remove_unfinished(tmp_path, "step-*")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.unfinished", "step-4"]


def test_files_of_others_that_look_temporary_stay(tmp_path):
    """Also those that a writer with fixed temporary names would have taken for its own."""
    mine = ("x.tmp", ".x.unfinished", f".x.{os.getpid()}.unfinished", "x.unfinished")
    for name in mine:
        (tmp_path / name).write_text("mine")
    write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "new"
    for name in mine:
        assert (tmp_path / name).read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == len(mine) + 1


def test_json_refuses_what_json_lacks_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"α": [0.1 + 0.2, None]})
    assert json.loads(path.read_text()) == {"α": [0.1 + 0.2, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"x": float("nan")})
    assert path.read_text() == '{\n "α": [\n  0.30000000000000004,\n  null\n ]\n}\n'


def test_a_directory_appears_when_all_of_it_is_on_the_disk(tmp_path, order):
    with complete_directory(tmp_path / "step") as folder:
        assert folder.parent.parent == tmp_path
        assert folder.parent.name.startswith(".step.")
        assert list(folder.iterdir()) == []
        (folder / "inside").mkdir()
        (folder / "inside" / "a").write_text("1")
        (folder / "b").write_text("2")
        assert order == []
    assert sorted(order[:2]) == ["flush a", "flush b"]  # at once
    assert order[2:] == [
        *("flush inside", "flush step", "rename step step", f"flush {tmp_path.name}")
    ]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "inside", "step"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("where", ["body", "flush"])
def test_a_directory_that_fails_is_not_there(tmp_path, monkeypatch, error, where):
    def raises(path):
        raise error

    if where == "flush":
        monkeypatch.setattr(prm.files, "flush", raises)

    def fill():
        with complete_directory(tmp_path / "step") as folder:
            (folder / "a").write_text("1")
            if where == "body":
                raise error

    with pytest.raises(error):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_exists_is_not_replaced(tmp_path):
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "a").write_text("old")
    with pytest.raises(OSError, match="not empty"), complete_directory(tmp_path / "step") as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "step" / "a").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["step"]


def test_a_directory_is_renamed_before_it_is_removed(tmp_path, order):
    for name in ("step", "step.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("1")
    remove_directory(tmp_path / "step")
    remove_directory(tmp_path / "step")
    (renamed,) = order
    assert renamed.startswith("rename step .step.")
    assert [entry.name for entry in tmp_path.iterdir()] == ["step.tmp"]
