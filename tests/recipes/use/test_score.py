"""``score`` and ``select`` on the tiny task: values, resumption to the same bytes, refusals."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

import recipes.use.score
from prm.digests import digest_path
from prm.scoring import score_examples
from recipes import commands
from recipes.__main__ import main
from recipes.embedded.vocabulary import SYSTEM_PROMPT
from recipes.evaluation.scoring import score_rows
from recipes.models.loading import load_model, read_examples
from recipes.options.use import ScoreOptions, SelectOptions
from recipes.run.lock import locked
from recipes.use.score import all_aggregates, run_score
from recipes.use.scores_file import read_scores, settings_path
from tests.tiny_task import read_lines


@pytest.fixture
def options(task, tmp_path):
    def make(name="scores.jsonl", **more) -> ScoreOptions:
        common = {"model": str(task.model), "file": str(task.data / "test.jsonl")}
        common |= {"system_prompt": SYSTEM_PROMPT, "eval_batch_size": 3}
        return ScoreOptions(**{**common, "output": str(tmp_path / name), **more})

    return make


def test_every_candidate_has_step_scores_and_all_aggregates(options):
    made = options()
    rows = read_scores(run_score(made))
    prm, params = load_model(made)
    data = read_examples(prm, made, made.file)
    assert [row.id for row in rows] == [example.id for example in data.examples]
    for row, encoded in zip(rows, data.encoded, strict=True):
        (alone,) = score_examples(prm, params, [encoded], data.collator, 1)
        assert row.step_scores == pytest.approx(alone.tolist(), abs=1e-6)
        assert row.scores["mean"] == pytest.approx(sum(row.step_scores) / len(row.step_scores))
        assert row.scores["min"] == min(row.step_scores)
        assert row.scores["last"] == row.step_scores[-1]
        assert (row.group, row.answer, row.correct) == (
            encoded.example.group, encoded.example.answer, encoded.example.correct
        )  # fmt: skip


def test_a_model_that_is_not_named_is_told(options, capsys):
    """The scores of a base that nobody trained would pass for those of a model."""
    load_model(options())
    assert capsys.readouterr().err == ""
    load_model(options(model="embedded"))
    said = capsys.readouterr().err
    assert said == "model: the base that ships with the package; --model names another\n"


def test_all_aggregates_by_hand():
    assert all_aggregates(torch.tensor([0.5, 0.8])) == pytest.approx(
        {
            "mean": 0.65,
            "min": 0.5,
            "max": 0.8,
            "last": 0.8,
            "product": 0.4,
            "log_mean": 0.4**0.5,
            "logit_mean": 2 / 3,  # odds 1 and 4
            "logit_sum": 0.8,
        }
    )


def test_vocabulary_probabilities_are_smaller(options):
    two_way = read_scores(run_score(options()))
    whole = read_scores(run_score(options("other.jsonl", probability="vocabulary")))
    for row, other in zip(two_way, whole, strict=True):
        assert all(a > b > 0 for a, b in zip(row.step_scores, other.step_scores, strict=True))


@pytest.mark.parametrize("cut", [0, 7, -40])
def test_an_interrupted_file_is_continued_to_the_same_bytes(options, monkeypatch, capsys, cut):
    monkeypatch.setattr(recipes.use.score, "WINDOW", 2)  # 6 of the 20 candidates
    whole = run_score(options("whole.jsonl")).read_bytes()
    calls = []

    def interrupted(*args, **more):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score_rows(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(recipes.use.score, "score_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_score(options())
    output = Path(options().output)
    assert output.read_bytes() == b"".join(whole.splitlines(keepends=True)[:12])
    if cut > 0:  # the machine died in the middle of the next line
        output.write_bytes(whole[: len(output.read_bytes()) + cut])
    elif cut < 0:  # ... or before the last line reached the disk
        output.write_bytes(output.read_bytes()[:cut])
    assert run_score(options()).read_bytes() == whole
    there = 12 if cut >= 0 else 11
    assert f"{20 - there} solutions scored in " in capsys.readouterr().out
    monkeypatch.setattr(recipes.use.score, "score_rows", None)  # nothing is left to do
    assert run_score(options()).read_bytes() == whole
    said = capsys.readouterr().out
    assert re.search(r": 0 solutions scored in \d+\.\d s, 20 were there\n", said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"context": "gold"}, "context: 'plus'"),
        ({"probability": "vocabulary"}, "probability: 'labels'"),
        ({"system_prompt": "judge"}, f"system_prompt: {SYSTEM_PROMPT!r}"),
        ({"model": "embedded"}, "of other content"),
    ],
)
def test_a_file_made_with_other_settings_is_refused(task, options, capsys, change, said):
    before = run_score(options()).read_bytes()
    assert commands.run("score", options(**change)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "holds scores made with other settings (" in line
    assert said in line
    assert Path(options().output).read_bytes() == before


def test_a_file_of_other_data_is_refused(task, options, capsys):
    run_score(options())
    assert commands.run("score", options(file=str(task.data / "dev.jsonl"))) == 2
    assert "test.jsonl of other content" in capsys.readouterr().err


def test_a_file_of_unknown_origin_is_refused(options, tmp_path, capsys):
    Path(options().output).write_text("{}\n")
    assert commands.run("score", options()) == 2
    assert "exists, without scores.jsonl.settings.json beside it" in capsys.readouterr().err
    assert commands.run("score", options(output=str(tmp_path))) == 2


def test_scores_that_are_no_numbers_are_named(options, monkeypatch, capsys):
    def diverged(*args, **more):
        return [row * float("nan") for row in score_rows(*args, **more)]

    monkeypatch.setattr(recipes.use.score, "score_rows", diverged)
    assert commands.run("score", options()) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "test.jsonl: example 'test-0000-0': expected numbers as step scores, found [nan" in line


def test_an_interrupted_file_is_not_selected_from(options, monkeypatch, capsys, tmp_path):
    """Of the 20 candidates 6 are there: the last question has 2 of its 4."""
    monkeypatch.setattr(recipes.use.score, "WINDOW", 2)
    calls = []

    def interrupted(*args, **more):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score_rows(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(recipes.use.score, "score_rows", interrupted)
        assert commands.run("score", options()) == 130
    select = SelectOptions(scores=options().output, output=str(tmp_path / "best.jsonl"))
    capsys.readouterr()
    assert commands.run("select", select) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "expected the scores of 20 solutions, and the digest of the complete file" in line
    assert "found 6, without scores.jsonl.sha256" in line
    assert not (tmp_path / "best.jsonl").exists()
    assert commands.run("score", options()) == 0
    assert commands.run("select", select) == 0
    assert len(read_lines(tmp_path / "best.jsonl")) == 5


def test_a_changed_file_is_not_gone_on_with(options, capsys):
    output = run_score(options())
    content = output.read_bytes()
    output.write_bytes(content.replace(b'"correct": true', b'"correct": null', 1))
    assert commands.run("score", options()) == 1
    assert "changed after it was written, or is damaged" in capsys.readouterr().err
    assert commands.run("score", options(overwrite=True)) == 0
    assert output.read_bytes() == content


def test_a_file_of_an_older_version_is_gone_on_with_and_completed(options, monkeypatch, capsys):
    output = run_score(options())
    content = output.read_bytes()
    digest_path(output).unlink()
    settings = json.loads(settings_path(output).read_text())
    assert settings.pop("solutions") == 20
    settings_path(output).write_text(json.dumps(settings))
    output.write_bytes(b"".join(content.splitlines(keepends=True)[:7]))
    assert run_score(options()).read_bytes() == content
    assert json.loads(settings_path(output).read_text()) == settings | {"solutions": 20}
    capsys.readouterr()
    assert len(read_scores(output)) == 20
    assert capsys.readouterr().err == ""


def test_settings_and_digests_of_others_are_not_overwritten(options, capsys):
    output = Path(options().output)
    for path in (settings_path(output), digest_path(output)):
        path.write_text("mine")
        assert commands.run("score", options()) == 2
        assert f"{path.name} exists already, without scores" in capsys.readouterr().err
        assert (path.read_text(), output.exists()) == ("mine", False)
        path.unlink()


def test_two_processes_do_not_write_one_file(options, capsys, tmp_path):
    """The second names the first, also by another name of the file, and changes nothing."""
    (tmp_path / "link").symlink_to(options().output)
    with locked(Path(options().output)):
        for name in ("scores.jsonl", "link"):
            assert commands.run("score", options(name)) == 2
            line = capsys.readouterr().err
            assert "another process writes this file (process " in line
            assert f"(process {os.getpid()} on " in line
            assert f"remove {options().output}.lock\n" in line
        assert {path.name for path in tmp_path.iterdir()} == {"link", "scores.jsonl.lock"}
    assert commands.run("score", options()) == 0
    assert not Path(options().output + ".lock").exists()


def test_a_full_disk_is_said_and_what_was_scored_is_gone_on_with(options, monkeypatch, capsys):
    whole = run_score(options("whole.jsonl")).read_bytes()
    monkeypatch.setattr(recipes.use.score, "WINDOW", 2)
    fsync, calls = os.fsync, []

    def full(handle):
        if Path(f"/proc/self/fd/{handle}").resolve() == Path(options().output):
            calls.append(handle)
            if len(calls) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert commands.run("score", options()) == 1
    said = f"bilevel-prm score: {options().output}: No space left on device\n"
    assert capsys.readouterr().err == said
    assert 0 < len(Path(options().output).read_bytes()) < len(whole)
    assert run_score(options()).read_bytes() == whole


@pytest.fixture
def scores(tmp_path) -> Path:
    path = tmp_path / "scores.jsonl"
    rows = [
        ("q1", "a", 0.9, 0.1), ("q2", "b", 0.5, 0.5), ("q1", "c", 0.2, 0.8), ("q1", "d", 0.9, 0.3),
    ]  # fmt: skip
    lines = [
        {"id": name, "group": group, "answer": name.upper(), "correct": name == "d",
         "step_scores": [0.5], "scores": {"mean": mean, "orm": orm}}
        for group, name, mean, orm in rows
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def selected(scores: Path, **more) -> list[dict]:
    output = scores.with_name("selected.jsonl")
    options = SelectOptions(scores=str(scores), output=str(output), overwrite=True, **more)
    assert commands.run("select", options) == 0
    return read_lines(output)


def test_select_takes_the_best_of_every_question(scores):
    first = {"group": "q1", "id": "a", "score": 0.9, "answer": "A", "correct": False}
    second = {"group": "q2", "id": "b", "score": 0.5, "answer": "B", "correct": False}
    second["tied"] = ["b"]
    assert selected(scores, tie="first") == [first | {"tied": ["a", "d"]}, second]
    last = {"id": "d", "answer": "D", "correct": True, "tied": ["a", "d"]}
    assert selected(scores, tie="last") == [first | last, second]
    (best, _) = selected(scores, aggregation="orm")
    assert (best["id"], best["score"], best["tied"]) == ("c", 0.8, ["c"])


def test_a_draw_depends_on_seed_and_question_only(scores):
    drawn = [selected(scores, seed=seed)[0]["id"] for seed in range(12)]
    assert set(drawn) == {"a", "d"}
    lines = scores.read_text().splitlines(keepends=True)
    scores.write_text("".join([lines[1], lines[0], *lines[2:]]))
    assert [selected(scores, seed=seed)[1]["id"] for seed in range(12)] == drawn


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("--aggregation men", 2, "line 1 of {scores} has mean, orm; did you mean 'mean'?"),
        ("--output {scores}", 2, "is a file that is read; name another"),
        ("--scores ./none.jsonl", 2, "none.jsonl: no such file"),
        ("--tie expected", 2, "tie: expected one of random, first, last; found 'expected'"),
    ],
)
def test_select_refuses(scores, capsys, words, status, message):
    command = ["select", "--scores", str(scores), "--output", str(scores.with_name("o.jsonl"))]
    command += words.format(scores=scores).split()
    assert main(command) == status
    assert message.format(scores=scores) in capsys.readouterr().err


def test_select_needs_questions(scores, capsys):
    scores.write_text('{"id": "a", "step_scores": [0.5], "scores": {"mean": 0.5}}\n')
    command = ["select", "--scores", str(scores), "--output", str(scores.with_name("o.jsonl"))]
    assert main(command) == 1
    assert "scores.jsonl:1: field group: expected the name of the" in capsys.readouterr().err


def test_select_leaves_out_bad_rows_if_asked(scores, tmp_path, capsys):
    """A line cut off, an id that was there before, no question, no such score."""
    whole = selected(scores, tie="first")
    good = scores.read_text().splitlines()
    bad = {
        2: '{"id": "cut", "step_sc',
        4: good[0],
        5: '{"id": "alone", "step_scores": [1], "scores": {"mean": 1}}',
        7: '{"id": "other", "group": "q1", "step_scores": [1], "scores": {"min": 1}}',
    }
    rest = iter(good)
    places = range(1, len(good) + len(bad) + 1)
    lines = [bad[at] if at in bad else next(rest) for at in places]
    scores.write_text("\n".join(lines) + "\n")
    out = tmp_path / "out.jsonl"
    command = ["select", "--scores", str(scores), "--output", str(out), "--tie", "first"]
    assert main(command) == 1
    assert f"{scores}:2" in capsys.readouterr().err
    assert not out.exists()
    skip = [*command, "--on-bad-row", "skip"]
    assert main(skip) == 1
    said = capsys.readouterr().err
    assert f"expected at most 0.1 of the rows to be left out, found 4 of {len(lines)} rows" in said
    assert main([*skip, "--max-bad-rows", "0.5"]) == 0
    assert f"4 of {len(lines)} rows" in capsys.readouterr().out
    assert read_lines(out) == whole
    listed = read_lines(tmp_path / "out.jsonl.skipped.jsonl")
    assert [(row["line"], row["field"], row["id"]) for row in listed] == [
        (2, None, None),
        (4, "id", None),
        (5, "group", "alone"),
        (7, "scores.mean", "other"),
    ]
    scores.write_text(bad[5] + "\n")
    assert main([*skip, "--max-bad-rows", "1", "--overwrite"]) == 1
    said = capsys.readouterr().err
    assert "expected a candidate, found none in 1 rows; the first is line 1, field " in said
    assert main(["select", "--scores", str(scores), "--output", "-", "--on-bad-row", "skip"]) == 2
    assert "--on-bad-row skip: needs --output" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "words",
    [
        ["score", "--output", "{out}", "--file", "{test}"],
        ["evaluate", "--output", "{out}", "--file", "{test}"],
        ["weigh", "--output", "{out}", "--file", "{train}", "--by", "small-loss"],
    ],
    ids=lambda words: words[0],
)
def test_scoring_shows_a_bar_on_a_terminal_alone(task, tmp_path, monkeypatch, capsys, words):
    files = {name: task.data / f"{name}.jsonl" for name in ("test", "train")}
    words = [word.format(**files, out=tmp_path / "out") for word in words]
    words += ["--model", str(task.model), "--system-prompt", SYSTEM_PROMPT]
    rows = len(read_lines(files["train" if words[0] == "weigh" else "test"]))
    assert main(words) == 0
    assert capsys.readouterr().err == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main([*words, "--overwrite"]) == 0
    assert "scoring: 100%" in terminal.getvalue()
    assert f"{rows}/{rows} [" in terminal.getvalue()
