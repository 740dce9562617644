"""``--on-bad-row`` of every command that reads rows, and what a resumed run makes of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from recipes.__main__ import main
from recipes.embedded.vocabulary import SYSTEM_PROMPT
from recipes.options.parse import changed
from recipes.options.values import OptionError
from recipes.train.cold_start import run_cold_start
from recipes.train.training import run_training
from tests.tiny_task import altered, model_bits, read_lines


def spoiled(source: Path, target: Path) -> Path:
    """A copy whose third row has a blank step."""

    def blank(place, row):
        return row | {"steps": [{"text": " "}, *row["steps"]]} if place == 2 else row

    return altered(source, target, blank)


def mended(source: Path, target: Path) -> Path:
    """A copy without its third row."""
    altered(source, target, lambda _, row: row)
    rows = target.read_text().splitlines(keepends=True)
    target.write_text("".join(rows[:2] + rows[3:]))
    return target


def listed(path: Path) -> list[tuple[int, str]]:
    return [(row["line"], row["field"]) for row in read_lines(path)]


@pytest.fixture
def files(task, tmp_path):
    """The spoiled file of every set, and beside it the same without its bad row."""
    made = {}
    for name in ("train", "meta", "test"):
        made[name] = spoiled(task.data / f"{name}.jsonl", tmp_path / f"{name}.jsonl")
        made[f"{name} mended"] = mended(task.data / f"{name}.jsonl", tmp_path / f"{name}-m.jsonl")
    return made


THIRD = [(3, "steps[0].text")]


def command(task, *words: object) -> int:
    common = ["--model", task.model, "--system-prompt", SYSTEM_PROMPT, "--allow-outside-images"]
    return main([str(word) for word in (*words, *common)])


def test_score_and_evaluate(task, files, tmp_path, capsys):
    scores, same = tmp_path / "scores.jsonl", tmp_path / "same.jsonl"
    assert command(task, "score", "--file", files["test"], "--output", scores) == 1
    said = capsys.readouterr().err
    assert f"{files['test']}:3: field steps[0].text" in said
    assert "mend it, or leave such rows out with --on-bad-row skip" in said
    assert not scores.exists()
    skip = ("--on-bad-row", "skip")
    assert command(task, "score", "--file", files["test"], "--output", scores, *skip) == 0
    assert "1 of " in (said := capsys.readouterr().out)
    assert f"left out, listed in {scores}.skipped.jsonl" in said
    assert listed(tmp_path / "scores.jsonl.skipped.jsonl") == THIRD
    assert command(task, "score", "--file", files["test mended"], "--output", same) == 0
    assert not (tmp_path / "same.jsonl.skipped.jsonl").exists()
    assert scores.read_bytes() == same.read_bytes()

    given = ("evaluate", "--file", files["test"], "--output", tmp_path / "e.json")
    assert command(task, *given) == 1
    assert command(task, *given, *skip) == 0
    assert listed(tmp_path / "e.json.skipped.jsonl") == THIRD
    whole = command(task, "evaluate", "--file", files["test mended"], "--output", tmp_path / "m")
    assert whole == 0
    assert json.loads((tmp_path / "e.json").read_text()) == json.loads((tmp_path / "m").read_text())
    assert main(["evaluate", "--file", str(files["test"]), "--on-bad-row", "skip"]) == 2
    assert "needs --output" in capsys.readouterr().err


def test_a_solution_too_long_for_the_model_can_be_left_out(task, tmp_path, capsys):
    """Scored without it, and ``evaluate`` of these scores leaves it out, too."""
    long = altered(
        task.data / "test.jsonl",
        tmp_path / "long.jsonl",
        lambda place, row: row | ({"steps": row["steps"] * 400} if place == 5 else {}),
    )
    scores = tmp_path / "scores.jsonl"
    given = ("score", "--file", long, "--output", scores)
    assert command(task, *given) == 1
    said = capsys.readouterr().err
    assert f"{long}:6: example " in said
    assert "leave it out (--on-bad-row skip)" in said
    assert "max_length" not in said
    assert command(task, *given, "--on-bad-row", "skip") == 0
    (row,) = read_lines(tmp_path / "scores.jsonl.skipped.jsonl")
    assert (row["line"], row["id"]) == (6, read_lines(long)[5]["id"])
    again = ("--scores", str(scores), "--allow-outside-images")
    assert main(["evaluate", "--file", str(long), *again]) == 1
    assert "one that `score` left out" in capsys.readouterr().err
    output = ("--output", str(tmp_path / "out.json"), "--on-bad-row", "skip")
    assert main(["evaluate", "--file", str(long), *again, *output]) == 0


@pytest.mark.parametrize("by", ["bis", "random", "small-loss"])
def test_weigh(task, files, tmp_path, by):
    out = tmp_path / "w.jsonl"
    words = ["weigh", "--by", by, "--file", files["train"], "--output", out]
    words += ["--allow-outside-images", *(["--model", task.model] if by == "small-loss" else [])]
    assert main([str(word) for word in words]) == 1
    assert main([str(word) for word in (*words, "--on-bad-row", "skip")]) == 0
    assert len(read_lines(out)) == len(read_lines(files["train"])) - 1
    assert listed(tmp_path / "w.jsonl.skipped.jsonl") == THIRD


def test_data_commands(files, tmp_path, capsys):
    outside = ["--allow-outside-images"]
    skip = ["--on-bad-row", "skip", *outside]
    train = str(files["train"])
    assert main(["data", "validate", train, *outside]) == 1
    assert main(["data", "validate", train, *skip]) == 0
    assert "1 of 18 rows (5.6 %) left out" in capsys.readouterr().out
    assert main(["data", "validate", train, *skip, "--max-bad-rows", "0"]) == 1
    out = str(tmp_path / "out.jsonl")
    assert main(["data", "convert", train, "--out", out, *outside]) == 1
    assert not Path(out).exists()
    assert main(["data", "convert", train, "--out", out, *skip]) == 0
    assert (len(read_lines(Path(out))), listed(Path(f"{out}.skipped.jsonl"))) == (17, THIRD)
    stepwise = str(tmp_path / "stepwise.jsonl")
    assert main(["data", "convert", train, "--to", "stepwise", "--out", stepwise, *skip]) == 0
    assert len(read_lines(Path(stepwise))) == 17
    parts = str(tmp_path / "parts")
    assert main(["data", "split", train, "--out", parts, "--parts", "a=rest", *skip]) == 0
    assert len(read_lines(tmp_path / "parts" / "a.jsonl")) == 17
    assert listed(tmp_path / "parts.skipped.jsonl") == THIRD
    assert main(["data", "validate", train, "--max-bad-rows", "0.5"]) == 2
    assert "--max-bad-rows 0.5 has no effect with --on-bad-row refuse" in capsys.readouterr().err


def test_a_run_without_its_bad_rows_has_the_bits_of_one_on_a_mended_file(task, files, tmp_path):
    def run(name: str, **more):
        sets = {f"{s}_file": str(files[f"{s}{name}"]) for s in ("train", "meta", "test")}
        return task.train(tmp_path / f"run{name.strip()}", weighting="table", **sets, **more)

    skipping = run_training(run("", on_bad_row="skip"))
    whole = run_training(run(" mended"))
    assert model_bits(skipping) == model_bits(whole)
    for name in ("train", "meta", "test"):
        assert listed(skipping / f"{name}.skipped.jsonl") == THIRD
        assert not (whole / f"{name}.skipped.jsonl").exists()


def test_a_cold_start_leaves_out_bad_rows(task, files, tmp_path):
    given = {"train_file": str(files["train"]), "draw": 0, "on_bad_row": "skip"}
    run = run_cold_start(task.cold_start(tmp_path / "run", **given))
    assert json.loads((run / "results.json").read_text())["examples"] == 17
    assert listed(run / "train.skipped.jsonl") == THIRD


def test_a_resumed_run_refuses_to_leave_out_other_rows(task, tmp_path):
    """A picture that was missing when the run began, and is there when it is resumed."""
    picture = tmp_path / "late.png"

    def without(place, row):
        return row | {"images": [str(picture)]} if place == 2 else row

    train = altered(task.data / "train.jsonl", tmp_path / "train.jsonl", without)
    given = {"train_file": str(train), "on_bad_row": "skip", "save_every": 2}
    run = run_training(task.train(tmp_path / "run", weighting="table", **given))
    bits = model_bits(run)
    (run / "results.json").unlink()
    again = changed(
        task.train(tmp_path / "run", weighting="table", **given),
        resume=str(run / "checkpoints" / "step-2"),
    )
    images = read_lines(task.data / "train.jsonl")[0]["images"]
    os.link(task.data / images[0], picture)
    with pytest.raises(
        OptionError, match=r"other rows are left out than when the run began \(0 no"
    ):
        run_training(again)
    picture.unlink()
    run_training(again)
    assert model_bits(run) == bits


def test_a_pipe_is_named_and_so_is_a_folder(tmp_path, capsys):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    commands = (
        ["data", "validate", str(pipe)],
        ["data", "convert", str(pipe), "--out", str(tmp_path / "out")],
        ["score", "--file", str(pipe), "--output", str(tmp_path / "out")],
    )
    for words in commands:
        assert main(words) == 2
        assert (
            f"{pipe}: is a pipe or a device, which can be read only once" in capsys.readouterr().err
        )
    assert main(["data", "validate", str(tmp_path)]) == 2
    assert "is a folder; name the file of rows in it" in capsys.readouterr().err


def test_the_list_of_an_earlier_output_is_neither_replaced_nor_taken_for_that_of_a_new_one(
    task, files, tmp_path, capsys
):
    out = tmp_path / "out"
    old = Path(f"{out}.skipped.jsonl")
    commands = [
        ("data", "convert", files["train"], "--out", out),
        ("data", "split", files["train"], "--out", out, "--parts", "a=1", "b=rest"),
        ("score", "--file", files["test"], "--output", out),
        ("weigh", "--by", "random", "--file", files["train"], "--output", out),
    ]
    for words in commands:
        old.write_text("old")
        model = ["--model", str(task.model)] if words[0] == "score" else []
        given = [str(word) for word in (*words, *model, "--allow-outside-images")]
        assert main([*given, "--on-bad-row", "skip"]) == 2
        assert old.name in capsys.readouterr().err
        assert (old.read_text(), out.exists()) == ("old", False)
    old.unlink()
    given = ["data", "convert", "--out", str(out), "--allow-outside-images"]
    assert main([*given, str(files["train"]), "--on-bad-row", "skip"]) == 0
    assert listed(old) == THIRD
    assert main([*given, str(files["train mended"]), "--overwrite"]) == 0
    assert not old.exists()
