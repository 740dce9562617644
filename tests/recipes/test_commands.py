"""Every command that writes: what it refuses, what it leaves alone, and how its errors end."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

import recipes.embedded.build
import recipes.run.provenance
from recipes import commands
from recipes.__main__ import main
from recipes.embedded.build import build
from recipes.embedded.vocabulary import SYSTEM_PROMPT
from recipes.options.embedded import DataOptions
from tests.tiny_task import SIZES, read_lines

SCORES = [
    {"id": f"{group}{number}", "group": group, "step_scores": [score], "scores": {"mean": score}}
    for group in "pq"
    for number, score in enumerate((0.25, 0.75))
]
FILES = ["select", "evaluate", "weigh", "score", "data validate", "data convert"]
"""Commands that write one file."""
FOLDERS = ["data split", "data embedded", "convert-model", "data pretrain-base"]
"""Commands that write one folder, which must not exist."""
RUNS = ["train", "cold-start", "compare"]
"""Commands that write into a folder that may exist."""
QUICK = [name for name in (*FILES, *FOLDERS) if name not in ("convert-model", "data pretrain-base")]
"""Commands whose whole work is done here."""


@pytest.fixture
def command(task, tmp_path, monkeypatch) -> Callable[[str, Path], list[str]]:
    """The words of a command that writes to a path."""
    monkeypatch.setattr(
        recipes.embedded.build, "build", lambda at, *, seed: build(at, seed=seed, sizes=SIZES)
    )
    scores = tmp_path / "in" / "scores.jsonl"
    scores.parent.mkdir()
    scores.write_text("".join(json.dumps(row) + "\n" for row in SCORES))
    test = tmp_path / "in" / "test.jsonl"
    rows = [
        {"id": row["id"], "group": row["group"], "question": row["group"], "answer": row["id"],
         "correct": row["id"].endswith("1"), "steps": [{"text": "so", "label": "+"}]}
        for row in SCORES
    ]  # fmt: skip
    test.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ["--model", str(task.model), "--system-prompt", SYSTEM_PROMPT]
    data = str(task.data / "train.jsonl")
    words = {
        "select": ["--scores", str(scores), "--output"],
        "evaluate": ["--file", str(test), "--scores", str(scores), "--output"],
        "weigh": ["--by", "bis", "--file", data, "--output"],
        "score": [*model, "--file", str(task.data / "dev.jsonl"), "--output"],
        "data validate": [data, "--json"],
        "data convert": [data, "--out"],
        "data split": [data, "--parts", "a=2", "b=rest", "--out"],
        "data embedded": ["--out"],
        "data pretrain-base": ["--out"],
        "convert-model": ["--input", str(task.model), "--output"],
        "train": [*model, "--train-file", data, "--weighting", "none", "--output-dir"],
        "cold-start": [*model, "--train-file", data, "--output-dir"],
        "compare": ["--work-dir", str(tmp_path / "work"), "--output-dir"],
    }
    return lambda name, path: [*name.split(), *words[name], str(path)]


def said(capsys, name: str) -> str:
    """What a command said on standard error: one line; notes and progress bars apart."""
    lines = [
        line
        for line in capsys.readouterr().err.splitlines()
        if not line.startswith("note: ") and "it/s]" not in line
    ]
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"bilevel-prm {name}: ")
    return lines[0]


def below(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below a folder, with the content of files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("name", [*FILES, *FOLDERS, *RUNS])
def test_a_pipe_is_never_replaced(command, tmp_path, capsys, name):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert main(command(name, pipe)) in (1, 2)
    assert str(pipe) in said(capsys, name)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("name", [*FILES, *FOLDERS, *RUNS])
def test_an_output_that_cannot_be_written_is_said_in_a_sentence_before_the_work(
    command, tmp_path, capsys, monkeypatch, name
):
    (tmp_path / "file").write_text("mine")
    target = tmp_path / "file" / "out"
    for work in (  # none of it begins
        *("prm.data.reader.spanned_rows", "prm.placement.Placement.load"),
        *("recipes.use.select.numbered_scores", "recipes.use.scores_file.numbered_scores"),
        *("recipes.embedded.build.load_scans", "recipes.use.convert_model.convert_internvl"),
    ):
        monkeypatch.setattr(work, None)
    before = below(tmp_path)
    assert main(command(name, target)) in (1, 2)
    line = said(capsys, name)
    assert str(target) in line
    assert "Not a directory" in line or "no such folder" in line
    assert below(tmp_path) == before


@pytest.mark.parametrize("name", QUICK)
def test_a_disk_that_is_full_at_the_end_is_said_in_a_sentence(
    command, tmp_path, capsys, monkeypatch, name
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = tmp_path / "out"
    before = below(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert main(command(name, target)) == 1
    line = said(capsys, name)
    assert line.endswith(": No space left on device")
    assert str(target) in line
    assert below(tmp_path) == before
    assert main(command(name, target)) == 0
    assert target.exists()


@pytest.mark.parametrize("name", QUICK)
def test_files_of_others_that_look_temporary_stay(command, tmp_path, name):
    mine = ("out.tmp", "out.unfinished", f".out.{os.getpid()}.unfinished", "out.part")
    for file in mine:
        (tmp_path / file).mkdir()
        (tmp_path / file / "precious").write_text("mine")
    assert main(command(name, tmp_path / "out")) == 0
    for file in mine:
        assert (tmp_path / file / "precious").read_text() == "mine"
    kept = {"out.settings.json", "out.sha256"}
    assert {path.name for path in tmp_path.iterdir()} - kept == {*mine, "out", "in"}


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_a_file_that_exists_is_refused(command, tmp_path, capsys, name):
    out = tmp_path / "out"
    out.write_text("mine")
    before = below(tmp_path)
    assert main(command(name, out)) in (1, 2)
    line = said(capsys, name)
    assert str(out) in line
    assert "exists" in line
    assert below(tmp_path) == before


@pytest.mark.parametrize("name", FILES)
def test_with_overwrite_a_link_is_followed_and_its_target_replaced(command, tmp_path, name):
    assert main(command(name, tmp_path / "plain")) == 0
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / "out", tmp_path / "link"
    real.write_text("mine")
    link.symlink_to(real)
    assert main([*command(name, link), "--overwrite"]) == 0
    assert link.is_symlink()
    assert real.read_bytes() == (tmp_path / "plain").read_bytes()
    assert [path.name for path in real.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["select", "evaluate", "data convert", "data validate", "weigh"])
def test_what_is_read_is_not_overwritten(command, tmp_path, capsys, name):
    words = command(name, tmp_path / "out")
    read = {"select": "--scores", "evaluate": "--scores", "weigh": "--file"}.get(name)
    source = Path(words[words.index(read) + 1] if read else words[2])
    content = source.read_bytes()
    (tmp_path / "link").symlink_to(source)
    for path in (source, tmp_path / "link"):
        assert main([*words[:-1], str(path), "--overwrite"]) == 2
        assert "is a file that is read; name another" in said(capsys, name)
        assert source.read_bytes() == content


@pytest.mark.parametrize("name", ["select", "evaluate", "weigh", "data validate"])
def test_a_dash_is_standard_output(command, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert main(command(name, tmp_path / "out")) == 0
    capsys.readouterr()
    assert main(command(name, Path("-"))) == 0
    found = capsys.readouterr()
    assert found.out == (tmp_path / "out").read_text()
    assert found.err
    assert not (tmp_path / "-").exists()


@pytest.mark.parametrize("name", ["score", "data convert"])
def test_a_dash_is_refused_where_a_file_is_needed(command, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert main(command(name, Path("-"))) == 2
    assert "expected a file, not standard output; name one" in said(capsys, name)
    assert not (tmp_path / "-").exists()


@pytest.mark.parametrize(
    ("name", "option"), [("evaluate", "--output"), ("data validate", "--json")]
)
def test_overwrite_without_an_output_has_no_effect(command, tmp_path, capsys, name, option):
    words = command(name, tmp_path / "out")
    assert main([*words[: words.index(option)], "--overwrite"]) == 2
    assert said(capsys, name).endswith(f"--overwrite has no effect without {option}")


def failing(error: Exception) -> Callable[[object], int]:
    def fail(options: object) -> int:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EIO, "Input/output error", "a\nb"), "a\\nb: Input/output error"),
        (OSError(errno.EXDEV, "Invalid", "a", None, "b"), "b: Invalid"),
        (PermissionError(errno.EACCES, "Permission denied", b"x"), "x: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("of a library"), "of a library"),
        (TimeoutError("of a library"), "of a library"),
        (SafetensorError("I/O error: disk full"), "I/O error: disk full"),
    ],
)
def test_no_error_of_the_machine_has_a_traceback(monkeypatch, capsys, error, reason):
    monkeypatch.setitem(commands._COMMANDS, "data embedded", failing(error))
    assert commands.run("data embedded", DataOptions()) == 1
    assert capsys.readouterr().err == f"bilevel-prm data embedded: {reason}\n"


@pytest.mark.parametrize(
    "words",
    [
        ("data", "validate", "{in}"),
        ("data", "validate", "{good}", "--test", "{in}"),
        ("data", "convert", "{in}", "--out", "{tmp}/o"),
        ("data", "convert", "{good}", "--to", "stepwise", "--weights", "{in}", "--out", "{tmp}/o"),
        ("data", "split", "{in}", "--parts", "a=1", "--out", "{tmp}/o"),
        ("data", "inspect", "{in}"),
        ("select", "--scores", "{in}", "--output", "{tmp}/o"),
        ("evaluate", "--file", "{in}", "--scores", "{good}", "--output", "{tmp}/o"),
        ("weigh", "--by", "bis", "--file", "{in}", "--output", "{tmp}/o"),
        ("train", "--train-file", "{in}", "--weighting", "none", "--output-dir", "{tmp}/o"),
    ],
    ids=lambda words: " ".join(word for word in words if "{" not in word),
)
def test_an_input_that_may_not_be_read_is_named(task, tmp_path, capsys, monkeypatch, words):
    closed = tmp_path / "closed.jsonl"
    closed.write_text("{}\n")
    opened = Path.open

    def refusing(path, *mode, **more):
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *mode, **more)

    monkeypatch.setattr(Path, "open", refusing)
    names = {"in": closed, "good": task.data / "train.jsonl", "tmp": tmp_path}
    given = [word.format(**names) for word in words]
    name = " ".join(given[:2]) if given[0] == "data" else given[0]
    assert main(given) == 1
    assert said(capsys, name) == f"bilevel-prm {name}: {closed}: Permission denied"
    assert not (tmp_path / "o").exists()


def test_control_characters_are_escaped_wherever_data_is_printed(tmp_path, capsys):
    evil = "\x1b[2J\x9b\u202e"
    folder = tmp_path / f"data{evil}"
    folder.mkdir()
    file = folder / "rows.jsonl"
    row = {"id": f"a{evil}", "question": "q", "steps": [{"text": "s", "label": "+"}]}
    file.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    for words in (
        ["data", "validate", str(file)],
        ["data", "inspect", str(file), "--row", "1", "--tokens"],
        ["data", "convert", str(file), "--out", str(tmp_path / "out")],
        ["runs", "list", str(folder)],
        ["runs", "show", str(folder)],
        ["weigh", "--by", "bis", "--file", str(file), "--output", str(tmp_path / f"w{evil}")],
        ["train", f"--{evil}"],
        ["train", "--config", evil],
    ):
        main(words)
        found = capsys.readouterr()
        text = found.out + found.err
        assert "\\x1b[2J\\x9b\\u202e" in text, words
        assert not set(evil) - {"[", "2", "J"} & set(text), words


def test_a_line_break_in_a_name_does_not_begin_a_line(tmp_path, capsys):
    run = tmp_path / "runs" / "x\ncomplete  1 of 1  train  evil"
    run.mkdir(parents=True)
    (run / "args.yaml").write_text("steps: 3\n")
    assert main(["runs", "list", str(tmp_path / "runs")]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("x\\ncomplete  1 of 1  train  evil")
    assert main(["runs", "show", str(run)]) == 0
    assert "\ncomplete" not in capsys.readouterr().out
    assert main(["runs", "show", str(tmp_path / "no\nrun")]) == 2
    assert said(capsys, "runs show").count("\\n") == 1
    rows = tmp_path / "rows\n.jsonl"
    rows.write_text(json.dumps({"id": "a", "question": "q", "steps": [{"text": "s"}]}) + "\n")
    assert main(["data", "validate", str(rows)]) == 0
    assert f"{tmp_path}/rows\\n.jsonl" in capsys.readouterr().out


def test_weights_that_are_written_are_those_that_are_checked(command, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command("weigh", out)) == 0
    words = command("data convert", tmp_path / "rows")
    words += ["--to", "stepwise", "--weights", str(out)]
    content = out.read_bytes()
    out.write_bytes(content.replace(b'"weight": 1.0', b'"weight": 3.0', 1))
    capsys.readouterr()
    assert main(words) == 1
    assert f"{out}: expected the content whose SHA-256 stands" in said(capsys, "data convert")
    assert not (tmp_path / "rows").exists()
    out.write_bytes(content)
    assert main(words) == 0
    assert "note" not in capsys.readouterr().err
    (tmp_path / "out.sha256").unlink()
    assert main([*words, "--overwrite"]) == 0
    assert capsys.readouterr().err == f"note: {out}: no out.sha256 beside it to check it with\n"
    assert len(read_lines(tmp_path / "rows")) == len(content.splitlines())
