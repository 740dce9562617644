"""A file is the old one or complete."""

from __future__ import annotations

import os
import stat

import pytest

from weighting.files import replacing, write_text


def test_content_is_on_disk_before_it_gets_the_name(tmp_path, monkeypatch):
    path, calls = tmp_path / "ids.json", []
    synced, renamed = os.fsync, os.replace

    def fsync(descriptor):
        calls.append(("fsync", os.fstat(descriptor).st_ino))
        synced(descriptor)

    def replace(source, target):
        calls.append(("rename", os.stat(source).st_ino, target))
        renamed(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_text(path, "größer\n")
    file, folder = path.stat().st_ino, tmp_path.stat().st_ino
    assert calls == [("fsync", file), ("rename", file, path), ("fsync", folder)]
    assert path.read_text(encoding="utf-8") == "größer\n"
    assert os.listdir(tmp_path) == ["ids.json"]


def test_a_file_of_others_that_looks_temporary_stays(tmp_path):
    (tmp_path / "ids.json.tmp").write_text("mine")
    write_text(tmp_path / "ids.json", "new")
    assert (tmp_path / "ids.json.tmp").read_text() == "mine"


def test_a_link_is_followed_and_a_pipe_is_never_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "ids.json").symlink_to(tmp_path / "real" / "ids.json")
    for text in ("first", "second"):  # the link leads nowhere at first
        write_text(tmp_path / "ids.json", text)
        assert (tmp_path / "ids.json").is_symlink()
        assert (tmp_path / "real" / "ids.json").read_text() == text
    assert os.listdir(tmp_path / "real") == ["ids.json"]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="found a folder, a device or a pipe"):
        write_text(tmp_path / "pipe", "text")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_what_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "ids.json"
    write_text(path, "old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("ne")
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["ids.json"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007])
def test_a_file_that_a_library_made_private_follows_the_umask(tmp_path, mask):
    """safetensors creates its files with the mode 0600."""
    old = os.umask(mask)
    try:
        with replacing(tmp_path / "params.safetensors") as temporary:
            temporary.touch(0o600)
    finally:
        os.umask(old)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
