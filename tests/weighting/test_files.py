"""A file is the old one or complete."""

from __future__ import annotations

import os

import pytest

from weighting.files import replacing, write_text


def test_content_is_on_disk_before_it_gets_the_name(tmp_path, monkeypatch):
    path, calls = tmp_path / "ids.json", []
    synced, renamed = os.fsync, os.replace

    def fsync(descriptor):
        target = tmp_path if ("rename", True) in calls else temporary
        calls.append(("fsync", os.path.samestat(os.fstat(descriptor), target.stat())))
        synced(descriptor)

    def replace(source, target):
        calls.append(("rename", (source, target) == (temporary, path)))
        renamed(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    temporary = tmp_path / "ids.json.tmp"
    write_text(path, "größer\n")
    assert calls == [("fsync", True), ("rename", True), ("fsync", True)]
    assert path.read_text(encoding="utf-8") == "größer\n"
    assert os.listdir(tmp_path) == ["ids.json"]


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
