"""The script at a tiny size on a CPU: one call, one table, one file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.evidence.gpu.__main__ import main
from recipes.options.values import OptionError

ROOT = Path(__file__).parents[4]
TINY = (
    "--size tiny --device cpu --rounds 1 --samples 2 --tiles 1 --positions 5 --caps 1 0.000001 "
    "--contenders floor original dot"
)


@pytest.mark.slow
def test_one_call_is_a_table_and_a_file(tmp_path):
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        ["sh", str(ROOT / "recipes" / "evidence" / "gpu.sh"), *TINY.split(), "--output", str(out)],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(out.read_text())
    rows = results["rows"]
    assert results["card"] is None
    assert "--size tiny" in results["command"]
    assert len(rows) == len(done.stderr.splitlines()) - 1  # and once at the end
    capped = [row["status"] for row in rows if row["measure"] == "cap"]
    assert capped == ["measured"] * 3 + ["out of memory"] * 3
    assert {row["status"] for row in rows if row["measure"] != "cap"} == {"measured"}
    assert {one["verdict"] for one in results["targets"]} == {"not measured"}
    assert {(one["contender"], one["precision"]) for one in results["agreement"]} == {
        (contender, precision)
        for contender in ("dot", "original")
        for precision in ("bf16", "bf16-pure")
    }
    step = {
        row["contender"]: row["seconds"]
        for row in rows
        if row["measure"] == "step" and row["precision"] == "bf16"
    }
    line = next(line for line in done.stdout.splitlines() if line.startswith("dot"))
    assert line.split()[:6] == ["dot", "bf16", "1", "5", "1", f"{step['dot']:.4f}"]
    assert line.split()[6] == f"{step['dot'] / step['floor']:.3f}"
    assert line.split()[7] == f"{step['original'] / step['dot']:.2f}"
    assert line.split()[-2:] == ["fits", "no"]


def test_without_a_gpu_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(OptionError, match="--size tiny --device cpu"):
        main(["--output", str(tmp_path / "gpu.json")])


def test_a_process_that_cannot_start_is_one_line(tmp_path, monkeypatch):
    command = [sys.executable, "-c", "import sys; sys.exit('no model')"]
    monkeypatch.setattr("recipes.evidence.gpu.__main__.command", lambda *_: command)
    with pytest.raises(OptionError, match="ended before it was ready: status 1: no model"):
        main(["--size", "tiny", "--device", "cpu", "--output", str(tmp_path / "gpu.json")])
