from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from prm.files import atomic_write, write_lines


class Stop(Exception):
    pass


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def calls(monkeypatch):
    """What reaches the disk, in order: ("fsync", inode) and ("replace", target)."""
    log: list[tuple[str, object]] = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(handle):
        log.append(("fsync", os.fstat(handle).st_ino))
        fsync(handle)

    def logged_replace(source, target):
        log.append(("replace", Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    return log


def test_a_file_is_flushed_renamed_and_its_name_flushed(tmp_path, calls):
    file = tmp_path / "rows.jsonl"
    file.write_text("old\n")
    write_lines(file, iter(["ä\n", "b\n"]))
    assert file.read_bytes() == "ä\nb\n".encode()
    assert names(tmp_path) == ["rows.jsonl"]
    inodes = (file.stat().st_ino, tmp_path.stat().st_ino)
    assert calls == [("fsync", inodes[0]), ("replace", file), ("fsync", inodes[1])]


def test_lines_that_fail_leave_the_old_file_and_no_temporary_name(tmp_path, calls):
    file = tmp_path / "rows.jsonl"
    file.write_text("old\n")

    def lines():
        yield "new\n"
        ours, old = names(tmp_path)
        assert (ours[:12], old) == (".rows.jsonl.", "rows.jsonl")
        assert file.read_text() == "old\n"
        raise Stop

    with pytest.raises(Stop):
        write_lines(file, lines())
    assert file.read_text() == "old\n"
    assert names(tmp_path) == ["rows.jsonl"]
    assert calls == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_refuses_leaves_the_old_file(tmp_path, monkeypatch, step):
    file = tmp_path / "rows.jsonl"
    file.write_text("old\n")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, refuse)
    with pytest.raises(OSError, match="No space left"):
        write_lines(file, ["new\n"])
    assert file.read_text() == "old\n"
    assert names(tmp_path) == ["rows.jsonl"]


def test_every_file_of_a_folder_is_flushed_before_the_folder_gets_its_name(tmp_path, calls):
    target = tmp_path / "model"
    with atomic_write(target) as unfinished:
        (unfinished / "parts").mkdir(parents=True)
        (unfinished / "config.json").write_text("{}")
        (unfinished / "parts" / "weights").write_bytes(b"\x01\x02")
        assert not target.exists()
    assert (target / "config.json").read_text() == "{}"
    assert (target / "parts" / "weights").read_bytes() == b"\x01\x02"
    assert names(tmp_path) == ["model"]
    before = calls[: calls.index(("replace", target))]
    inside = [target, target / "config.json", target / "parts", target / "parts" / "weights"]
    assert {inode for _, inode in before} == {path.stat().st_ino for path in inside}
    assert calls[-1] == ("fsync", tmp_path.stat().st_ino)


def test_a_folder_that_fails_half_way_does_not_appear(tmp_path, calls):
    target = tmp_path / "model"

    def write():
        with atomic_write(target) as unfinished:
            unfinished.mkdir()
            (unfinished / "config.json").write_text("{}")
            raise Stop

    with pytest.raises(Stop):
        write()
    assert names(tmp_path) == []
    assert calls == []


def test_an_empty_folder_is_replaced_and_a_full_one_is_not(tmp_path):
    target = tmp_path / "model"
    target.mkdir()

    def write(text):
        with atomic_write(target) as unfinished:
            unfinished.mkdir()
            (unfinished / "file").write_text(text)

    write("new")
    assert (target / "file").read_text() == "new"
    with pytest.raises(OSError, match="not empty"):
        write("newer")
    assert (target / "file").read_text() == "new"
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007])
def test_files_that_a_library_made_private_follow_the_umask(tmp_path, mask):
    """safetensors creates its files with the mode 0600; other modes stay."""
    old = os.umask(mask)
    try:
        with atomic_write(tmp_path / "one") as unfinished:
            unfinished.touch(0o600)
        with atomic_write(tmp_path / "folder") as unfinished:
            (unfinished / "below").mkdir(parents=True)
            (unfinished / "below" / "private").touch(0o600)
            (unfinished / "program").touch(0o777)
    finally:
        os.umask(old)
    folder = tmp_path / "folder"
    for path in (tmp_path / "one", folder / "below" / "private"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    assert (folder / "program").stat().st_mode & 0o777 == 0o777 & ~mask
    assert names(folder) == ["below", "program"]
    assert names(folder / "below") == ["private"]


def test_a_link_is_followed_and_a_pipe_is_never_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "rows").symlink_to(tmp_path / "real" / "rows")
    for text in ("first\n", "second\n"):  # the link leads nowhere at first
        write_lines(tmp_path / "rows", [text])
        assert (tmp_path / "rows").is_symlink()
        assert (tmp_path / "real" / "rows").read_text() == text
    assert names(tmp_path / "real") == ["rows"]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    for name, why in (("pipe", "is a device or a pipe"), ("loop", "Too many levels of symbolic")):
        with pytest.raises(OSError, match=why):
            write_lines(tmp_path / name, ["text\n"])
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert (tmp_path / "loop").is_symlink()


def test_files_of_others_that_look_temporary_stay(tmp_path):
    mine = ("x.tmp", f".x.{os.getpid()}.unfinished", "x.unfinished")
    for name in mine:
        (tmp_path / name).mkdir()
    with atomic_write(tmp_path / "x") as unfinished:
        unfinished.mkdir()
        (unfinished / "file").write_text("new")
    assert names(tmp_path) == sorted([*mine, "x"])


def test_a_replaced_file_keeps_its_permissions(tmp_path):
    (tmp_path / "rows").write_text("old\n")
    (tmp_path / "rows").chmod(0o640)
    write_lines(tmp_path / "rows", ["new\n"])
    assert stat.S_IMODE((tmp_path / "rows").stat().st_mode) == 0o640


def test_errors_of_writing_name_the_target_and_those_of_the_body_stay(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError) as error:
        write_lines(tmp_path / "file" / "rows", ["x"])
    assert error.value.filename == str(tmp_path / "file" / "rows")

    def lines():
        yield "x"
        (tmp_path / "nothing").read_text()

    with pytest.raises(FileNotFoundError) as error:
        write_lines(tmp_path / "rows", lines())
    assert error.value.filename == str(tmp_path / "nothing")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_lines(tmp_path / "rows", ["x"])
    assert error.value.filename == str(tmp_path / "rows")
    assert names(tmp_path) == ["file"]
