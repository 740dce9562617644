"""Errors of the user and of the machine end in one line, of every command and tool."""

from __future__ import annotations

import ast
import errno
import subprocess
import sys
from pathlib import Path

import pytest

import recipes
from prm.schema import DataError
from recipes.options.values import OptionError
from recipes.run.errors import Stopped, WriteError, reported

ROOT = Path(recipes.__file__).parent


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (OptionError("--rows: expected more"), 2, "--rows: expected more"),
        (WriteError("--output a: cannot be written"), 1, "--output a: cannot be written"),
        (Stopped("stopped", 143), 143, "stopped"),
        (DataError(expected="a", found="b", file="f", line=3), 1, "f:3: expected a, found b"),
        (OSError(errno.ENOSPC, "No space left", "a.json"), 1, "a.json: No space left"),
        (OSError(errno.EXDEV, "Other disk", "a", None, "b"), 1, "b: Other disk"),
        (OSError("no number"), 1, "no number"),
        (ModuleNotFoundError("install bilevel-prm[demo]"), 1, "install bilevel-prm[demo]"),
        (KeyboardInterrupt(), 130, "interrupted; what was logged and saved so far is kept"),
    ],
)
def test_a_line_and_a_status(capsys, error, status, line):
    def command():
        raise error

    assert reported("tool", command, saves=True) == status
    assert capsys.readouterr().err.lstrip("\n") == f"tool: {line}\n"


def test_errors_of_the_program_keep_their_traceback():
    for error in (KeyError("a"), ModuleNotFoundError("torch")):

        def command(error=error):
            raise error

        with pytest.raises(type(error)):
            reported("tool", command)


def test_what_a_command_returns_is_its_status():
    assert reported("tool", lambda: None) == 0
    assert reported("tool", lambda: 3) == 3


PARTS = (
    *("memory_cap.py", "worker.py"),
    *("growth/candidates.py", "growth/ranks.py", "growth/shards.py"),
)
"""Run by a benchmark in a process of its own."""
TOOLS = [
    path
    for folder in ("problems", "evidence")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not path.as_posix().endswith(PARTS)
    and 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_every_tool_reports_its_errors(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert called & {"reported", "run_recipe"}


@pytest.mark.parametrize(
    ("module", "words", "said"),
    [
        ("evidence.smollm2.label", ["none.json", "none.csv"], "none.csv: No such file"),
        ("evidence.bench", ["--output", "{file}/out.json"], "--output {file}/out.json: cannot"),
        ("evidence.bench_validate", ["--output", "{file}/out.json"], "cannot be written"),
        ("problems.noisy_labels", ["--output", "{file}/out.json"], "cannot be written"),
    ],
)
def test_a_missing_file_and_an_output_that_cannot_be_written(tmp_path, module, words, said):
    file = tmp_path / "file"
    file.write_text("")
    done = subprocess.run(
        [sys.executable, "-m", f"recipes.{module}", *(word.format(file=file) for word in words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT.parent), "OMP_NUM_THREADS": "1"},
    )
    (line,) = done.stderr.splitlines()
    assert said.format(file=file) in line
    assert done.returncode == 1
