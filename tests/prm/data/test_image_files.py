"""Which images can be used: below the root, there, readable; each looked at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from prm.data.image_files import ImageFiles
from tests.prm.tiny import save_image


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    save_image(folder / "sub" / "x.png", 8, 8)
    save_image(tmp_path / "out.png", 8, 8)
    return folder


def test_inside(root):
    images = ImageFiles(root)
    assert images.problem(root / "sub" / "x.png") is None
    assert images.problem(root / "sub" / ".." / "sub" / "x.png") is None
    assert images.count == 2


def test_outside_is_refused_unless_allowed(root, tmp_path):
    (root / "folder").symlink_to(tmp_path)
    (root / "file.png").symlink_to(tmp_path / "out.png")
    (root / "inner.png").symlink_to(root / "sub" / "x.png")
    ways = [
        tmp_path / "out.png",
        root / ".." / "out.png",
        root / "sub" / ".." / ".." / "out.png",
        root / "folder" / "out.png",
        root / "file.png",
        root / ".." / "nothing.png",
    ]
    images, allowing = ImageFiles(root), ImageFiles(root, allow_outside=True)
    for path in ways:
        problem = images.problem(path)
        assert problem is not None, path
        assert (problem.fault, problem.found) == ("outside", str(path))
        assert "allow_outside_images" in problem.remedy
        found = allowing.problem(path)
        assert (found is None) == path.exists()
    assert images.problem(root / "inner.png") is None
    # The root itself may be reached through a link.
    (tmp_path / "alias").symlink_to(root)
    assert ImageFiles(tmp_path / "alias").problem(tmp_path / "alias" / "sub" / "x.png") is None
    assert ImageFiles(root).problem(tmp_path / "alias" / "sub" / "x.png") is None


def test_relative_roots_and_paths(root, monkeypatch):
    monkeypatch.chdir(root.parent)
    images = ImageFiles(Path("root"))
    assert images.problem(Path("root/sub/x.png")) is None
    assert images.problem(Path("out.png")).fault == "outside"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("none.png", "no file at"),
        ("sub", "a folder at"),
        ("a\0b.png", "null"),
        ("x" * 300, "no file at"),
    ],
)
def test_missing(root, name, found):
    problem = ImageFiles(root).problem(root / name)
    assert problem.fault == "missing"
    assert found in problem.found
    assert "image_root" in problem.remedy


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp"])
def test_cut_off_and_garbage(root, kind):
    whole, cut, noise = (root / f"{name}.{kind}" for name in ("whole", "cut", "noise"))
    Image.effect_noise((64, 64), 80).convert("RGB").save(whole)
    cut.write_bytes(whole.read_bytes()[:-900])
    noise.write_bytes(b"no image at all")
    exists, header, decode = (ImageFiles(root, check=c) for c in ("exists", "header", "decode"))
    for path in (whole, cut, noise):
        assert exists.problem(path) is None
    for images in (header, decode):
        assert images.problem(whole) is None
        assert images.problem(noise).fault == "unreadable"
    # A BMP has no end mark: only decoding tells.
    assert decode.problem(cut).fault == "unreadable"
    assert (header.problem(cut) is None) == (kind == "bmp")


def test_bytes_behind_the_end_are_no_fault(root):
    path = root / "padded.jpg"
    Image.new("RGB", (8, 8)).save(path)
    path.write_bytes(path.read_bytes() + b"\0" * 500)
    assert ImageFiles(root, check="header").problem(path) is None


def test_each_path_is_looked_at_once(root, monkeypatch):
    looked = []
    real = os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: looked.append(path) or real(path))
    images = ImageFiles(root)
    for _ in range(3):
        assert images.problem(root / "sub" / "x.png") is None
        assert images.problem(root / "none.png") is not None
    assert len(looked) == 2
    assert list(images.problems) == [str(root / "none.png")]


def test_a_header_tells_that_a_picture_cannot_be_used(root):
    """What decoding refuses, and a header shows, is found without decoding."""
    Image.new("F", (8, 8)).save(root / "floats.tiff")
    Image.new("I;16", (8, 8)).save(root / "sixteen.png")
    images = ImageFiles(root, check="header")
    assert "Pillow mode 'F'" in images.problem(root / "floats.tiff").found
    assert images.problem(root / "sixteen.png") is None
