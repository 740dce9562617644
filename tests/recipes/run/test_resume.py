"""How a run is gone on with: the command, the folder, and the pictures that it began with."""

from __future__ import annotations

import json
import os
import shlex
import shutil

import pytest
from PIL import Image

import recipes.train.loop
import recipes.train.training
from prm.data_urls import embedded
from recipes.__main__ import main
from recipes.options.parse import changed, saved_options
from recipes.run.errors import RunError
from recipes.run.identity import digest_pictures
from recipes.run.step_log import append_line
from recipes.train.training import run_training
from tests.tiny_task import model_bits, read_lines


@pytest.fixture
def interrupted(task, tmp_path, monkeypatch):
    """A run that a full disk ended after 3 of 5 steps, and the same one that nothing ended."""

    def no_space(path, line):
        if '"step": 4' in line:
            raise RunError("no space")
        append_line(path, line)

    options = task.train(tmp_path / "run", steps=5, log_every=1)
    whole = run_training(changed(options, output_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        patch.setattr(recipes.train.loop, "append_line", no_space)
        with pytest.raises(RunError, match="no space"):
            run_training(options)
    return tmp_path / "run", whole


def last_line(capsys) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def command_in(line: str) -> list[str]:
    program, *words = shlex.split(line.rpartition(": ")[2])
    assert program == "bilevel-prm"
    return words


def again(run, *words: str) -> int:
    """Call the command that began a run once more."""
    return main(["train", "--config", str(run / "args.yaml"), *words])


def test_the_same_command_names_what_goes_on_before_anything_is_loaded(
    interrupted, capsys, monkeypatch
):
    run, whole = interrupted
    with monkeypatch.context() as patch:
        patch.setattr(recipes.train.training, "load_trained", None)
        assert again(run) == 2
    line = last_line(capsys)
    assert line == (
        f"bilevel-prm train: --output-dir {run}: already holds this run, unfinished; nothing was "
        f"overwritten. Go on with: bilevel-prm train --resume {run}"
    )
    assert main(command_in(line)) == 0
    assert model_bits(run) == model_bits(whole)


def test_the_command_gives_the_options_that_a_resumed_run_may_change(interrupted, capsys):
    run, whole = interrupted
    assert again(run, "--log-every", "2", "--no-progress") == 2
    line = last_line(capsys)
    assert command_in(line)[:5] == ["train", "--resume", str(run), "--log-every", "2"]
    assert main(command_in(line)) == 0
    assert model_bits(run) == model_bits(whole)
    assert [entry["step"] for entry in read_lines(run / "log.jsonl")] == [1, 2, 3, 4, 5]


def test_other_options_are_named(interrupted, capsys):
    run, _ = interrupted
    assert again(run, "--steps", "7", "--lower-betas", "0.5", "0.6") == 2
    assert last_line(capsys) == (
        f"bilevel-prm train: --output-dir {run}: already holds an unfinished run with other "
        "options (--steps 7, there 5, --lower-betas 0.5 0.6, there (0.9, 0.98)); nothing was "
        f"overwritten. Choose another directory, or go on with that run: bilevel-prm train "
        f"--resume {run}"
    )


def test_a_path_with_spaces_is_quoted(interrupted, capsys):
    run, whole = interrupted
    moved = run.with_name("my run")
    run.rename(moved)
    assert again(moved, "--output-dir", str(moved)) == 2
    line = last_line(capsys)
    assert f"--resume '{moved}'" in line
    assert main(command_in(line)) == 0
    assert model_bits(moved) == model_bits(whole)


@pytest.fixture
def relative(task, tmp_path, monkeypatch):
    """A run that began with relative paths in the folder ``first``, interrupted; and the folder."""
    first = tmp_path / "first"
    shutil.copytree(task.data, first / "data")
    monkeypatch.chdir(first)
    options = task.train(
        "run",
        steps=5,
        train_file="data/train.jsonl",
        meta_file="data/meta.jsonl",
        test_file="data/test.jsonl",
        dev_file=None,
        log_every=1,
    )
    whole = run_training(changed(options, output_dir="whole"))

    def no_space(path, line):
        if '"step": 4' in line:
            raise RunError("no space")
        append_line(path, line)

    with monkeypatch.context() as patch:
        patch.setattr(recipes.train.loop, "append_line", no_space)
        with pytest.raises(RunError, match="no space"):
            run_training(options)
    return first, first / whole


def test_a_run_goes_on_from_another_folder(relative, tmp_path, monkeypatch):
    first, whole = relative
    args = (first / "run" / "args.yaml").read_text()
    assert "train_file: data/train.jsonl\n" in args
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    assert saved_options(first / "run")["meta_file"] == str(first / "data" / "meta.jsonl")
    assert main(["train", "--resume", "../first/run"]) == 0
    assert model_bits(first / "run") == model_bits(whole)
    kept = (first / "run" / "args.yaml").read_text()
    assert f"train_file: {first}/data/train.jsonl\n" in kept
    monkeypatch.chdir(first)
    assert saved_options(first / "run")["train_file"] == str(first / "data" / "train.jsonl")


def test_a_project_that_moved_goes_on_in_its_new_place(relative, tmp_path, monkeypatch):
    first, _ = relative
    moved = tmp_path / "moved"
    first.rename(moved)
    monkeypatch.chdir(moved)
    assert main(["train", "--resume", "run"]) == 0
    assert model_bits(moved / "run") == model_bits(moved / "whole")


def test_files_of_an_older_run_are_looked_for_from_here(relative, tmp_path, monkeypatch, capsys):
    """Its env.json does not say where that was."""
    first, whole = relative
    file = first / "run" / "env.json"
    content = json.loads(file.read_text())
    del content["folder"]
    file.write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume", "first/run"]) == 2
    assert last_line(capsys) == (
        "bilevel-prm train: --train-file data/train.jsonl: no such file. Relative paths in "
        "first/run/args.yaml are relative to the folder in which the run began: go on there, "
        "or give the option"
    )
    monkeypatch.chdir(first)
    assert main(["train", "--resume", "run"]) == 0
    assert model_bits(first / "run") == model_bits(whole)


@pytest.mark.parametrize("name", ["train", "meta"])
def test_a_changed_picture_is_noticed(relative, name, capsys):
    first, _ = relative
    picture = first / "data" / read_lines(first / "data" / f"{name}.jsonl")[-1]["images"][0]
    before = picture.read_bytes()
    with Image.open(picture) as image:
        other = image.convert("RGB")
    red, green, blue = other.getpixel((3, 3))
    other.putpixel((3, 3), (red, green, blue ^ 1))
    other.save(picture)
    assert main(["train", "--resume", "run"]) == 2
    line = last_line(capsys)
    assert f"--{name}-file (checkpoint: pictures of other content)" in line
    picture.write_bytes(before)
    assert main(["train", "--resume", "run"]) == 0


def test_the_digest_of_pictures_sees_content_and_order_alone(tmp_path):
    rows = [os.urandom(100), os.urandom(100_000), b""]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for number, content in enumerate(rows):
            (tmp_path / folder / str(number)).write_bytes(content)

    def of(folder, *numbers):
        return digest_pictures(tmp_path / folder / str(number) for number in numbers)

    assert of("a", 0, 1, 2) == of("b", 0, 1, 2) == of("a", 0, 1, 0, 2, 1)
    assert of("a", 0, 1, 2) != of("a", 1, 0, 2)
    assert digest_pictures([tmp_path / "a" / "0", embedded(b"x")]) == of("a", 0)
    for place in (0, 50_000, 99_999):  # the first, middle and last part
        changed_bytes = bytearray(rows[1])
        changed_bytes[place] ^= 1
        (tmp_path / "b" / "1").write_bytes(changed_bytes)
        assert of("b", 0, 1, 2) != of("a", 0, 1, 2)
    (tmp_path / "b" / "1").write_bytes(rows[1] + b"x")
    assert of("b", 0, 1, 2) != of("a", 0, 1, 2)
