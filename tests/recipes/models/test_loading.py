"""Solutions that are longer than the model's context: ``--too-long`` of every command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from recipes.__main__ import main
from recipes.embedded.vocabulary import SYSTEM_PROMPT
from recipes.models.loading import load_model, read_examples
from recipes.options.base import LoaderOptions
from recipes.train.cold_start import run_cold_start
from recipes.train.training import run_training
from tests.tiny_task import altered, model_bits, read_lines

LONG = 5
"""The row that is made too long."""


@pytest.fixture(scope="module")
def files(task, tmp_path_factory):
    """Of every set, a file with one solution that is too long, and the same with it cut by hand."""
    folder = tmp_path_factory.mktemp("long")
    made = {}
    options = LoaderOptions(
        model=str(task.model), system_prompt=SYSTEM_PROMPT, allow_outside_images=True
    )
    prm, _ = load_model(options)
    longest = prm.model.config.get_text_config().max_position_embeddings
    for name in ("train", "meta", "test"):

        def longer(place, row):
            return row | ({"steps": row["steps"] * 400} if place == LONG else {})

        long = altered(task.data / f"{name}.jsonl", folder / f"{name}.jsonl", longer)
        # Found by encoding, with no limit, the solution cut after each number of steps.
        whole = read_examples(prm, options, str(task.data / f"{name}.jsonl")).examples[LONG]
        collator = prm.collator(system_prompt=SYSTEM_PROMPT, max_patches=6, max_length=None)
        steps = whole.steps * 400
        kept = len(whole.steps)
        while len(collator.encode(replace(whole, steps=steps[: kept + 1])).input_ids) <= longest:
            kept += 1
        made[name] = long
        made[f"{name} kept"] = kept
        made[f"{name} cut"] = altered(
            long,
            folder / f"{name}-cut.jsonl",
            lambda place, row, kept=kept: (
                row | ({"steps": row["steps"][:kept]} if place == LONG else {})
            ),
        )
    return made


def listed(path: Path) -> list[tuple[int, str, int, int]]:
    return [(row["line"], row["id"], row["steps"], row["kept"]) for row in read_lines(path)]


def expected(files, name: str) -> list[tuple[int, str, int, int]]:
    row = read_lines(files[name])[LONG]
    return [(LONG + 1, row["id"], len(row["steps"]), files[f"{name} kept"])]


def command(task, *words: object) -> int:
    common = ["--model", task.model, "--system-prompt", SYSTEM_PROMPT, "--allow-outside-images"]
    return main([str(word) for word in (*words, *common)])


TRUNCATE = ("--too-long", "truncate")


def test_a_cut_solution_has_the_scores_of_its_first_steps(task, files, tmp_path, capsys):
    scores, by_hand = tmp_path / "scores.jsonl", tmp_path / "by-hand.jsonl"
    given = ("score", "--file", files["test"], "--output", scores)
    assert command(task, *given) == 1
    assert "keep its first steps (--too-long truncate" in capsys.readouterr().err
    assert command(task, *given, *TRUNCATE) == 0
    assert (
        "1 solutions are longer than the model's context; their first steps"
        in capsys.readouterr().out
    )
    assert listed(tmp_path / "scores.jsonl.truncated.jsonl") == expected(files, "test")
    assert command(task, "score", "--file", files["test cut"], "--output", by_hand) == 0
    rows, same = read_lines(scores), read_lines(by_hand)
    assert rows[LONG].pop("steps") == expected(files, "test")[0][2]
    assert rows == same
    assert len(rows[LONG]["step_scores"]) == files["test kept"]
    assert command(task, *given) == 1  # the same file refused again, whatever is there
    assert command(task, *given, "--on-bad-row", "skip") == 2
    assert "too_long: 'truncate'" in capsys.readouterr().err
    assert command(task, *given, *TRUNCATE) == 0

    best = tmp_path / "best.jsonl"
    assert main(["select", "--scores", str(scores), "--output", str(best)]) == 0
    assert "1 candidates are judged by their first steps alone" in capsys.readouterr().out
    for row in read_lines(best):
        is_cut = row["id"] == expected(files, "test")[0][1]
        assert ("scored_steps" in row) == ("steps" in row) == is_cut


def test_evaluate_judges_by_the_first_steps_and_says_so(task, files, tmp_path, capsys):
    scores, baseline = tmp_path / "scores.jsonl", tmp_path / "baseline.jsonl"
    for output in (scores, baseline):
        words = ("score", "--file", files["test"], "--output", output, *TRUNCATE)
        assert command(task, *words) == 0
    read = ["evaluate", "--file", str(files["test"]), "--scores", str(scores)]
    read += ["--allow-outside-images"]
    assert main(read) == 1
    said = capsys.readouterr().err
    assert "longer than the model's context" in said
    assert "with --too-long truncate" in said
    assert main([*read, *TRUNCATE]) == 2
    assert "--too-long truncate: needs --output" in capsys.readouterr().err
    made, asked = tmp_path / "read.json", tmp_path / "asked.json"
    more = [*TRUNCATE, "--baseline-scores", str(baseline), "--output", str(made)]
    assert main([*read, *more]) == 0
    said = capsys.readouterr().out
    assert "1 of 20 solutions are longer than the model's context, and judged by their" in said
    assert f"{baseline}: 1 of 20 solutions have scores of their first steps alone" in said
    assert listed(tmp_path / "read.json.truncated.jsonl") == expected(files, "test")
    words = ("evaluate", "--file", files["test"], "--output", asked, *TRUNCATE)
    assert command(task, *words, "--baseline-scores", baseline) == 0
    assert json.loads(made.read_text()) == json.loads(asked.read_text())
    by_hand = tmp_path / "by-hand.json"
    assert command(task, "evaluate", "--file", files["test cut"], "--output", by_hand) == 0
    figures = json.loads(by_hand.read_text())
    assert figures["n_truncated"] == 0
    assert not (tmp_path / "by-hand.json.truncated.jsonl").exists()
    assert json.loads(made.read_text())["solutions"] == figures["solutions"]


def test_changed_solutions_are_not_taken_for_cut_ones(task, files, tmp_path, capsys):
    scores = tmp_path / "scores.jsonl"
    words = ("score", "--file", files["test"], "--output", scores, *TRUNCATE)
    assert command(task, *words) == 0
    read = ["evaluate", "--file", str(files["test cut"]), "--scores", str(scores)]
    out = ["--output", str(tmp_path / "out.json"), "--allow-outside-images"]
    assert main([*read, *TRUNCATE, *out]) == 1
    assert "its solutions have changed" in capsys.readouterr().err


def test_a_run_has_the_bits_of_one_on_solutions_cut_by_hand(task, files, tmp_path):
    def run(name: str, end: str, **more):
        sets = {f"{one}_file": str(files[f"{one}{end}"]) for one in ("train", "test")}
        return task.train(tmp_path / name, weighting="table", **sets, **more)

    cut = run_training(run("cut", "", too_long="truncate"))
    by_hand = run_training(run("by-hand", " cut"))
    assert model_bits(cut) == model_bits(by_hand)
    for name in ("train", "test"):
        assert listed(cut / f"{name}.truncated.jsonl") == expected(files, name)
        assert not (by_hand / f"{name}.truncated.jsonl").exists()
    figures, others = (json.loads((one / "results.json").read_text()) for one in (cut, by_hand))
    assert figures["rows"] == others["rows"]
    assert figures["n_truncated"] == 1
    assert "n_truncated" not in others


def test_a_cold_start_cuts(task, files, tmp_path):
    given = {"train_file": str(files["train"]), "draw": 0, "too_long": "truncate"}
    run = run_cold_start(task.cold_start(tmp_path / "run", **given))
    assert listed(run / "train.truncated.jsonl") == expected(files, "train")


def test_a_meta_set_is_never_cut(task, files, tmp_path, capsys):
    given = ["train", "--train-file", task.data / "train.jsonl", "--meta-file", files["meta"]]
    given += ["--output-dir", tmp_path / "run", *TRUNCATE]
    assert command(task, *given) == 1
    said = capsys.readouterr().err
    assert f"{files['meta']}:{LONG + 1}" in said
    assert "at most 1024 tokens, found" in said
    assert "but of a meta set" in said


def test_weigh_cuts_for_the_model_that_it_asks(task, files, tmp_path, capsys):
    out = tmp_path / "weights.jsonl"
    words = ("weigh", "--by", "small-loss", "--file", files["train"], "--output", out)
    assert command(task, *words, *TRUNCATE) == 0
    assert listed(tmp_path / "weights.jsonl.truncated.jsonl") == expected(files, "train")
    assert len(read_lines(out)) == len(read_lines(files["train"]))
    words = ["weigh", "--by", "random", "--file", str(files["train"]), "--output", str(out)]
    assert main([*words, *TRUNCATE]) == 2
    assert "--too-long: no effect with --by random" in capsys.readouterr().err
