"""Two threads: the same command twice, in processes of its own, writes the same bits."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.tiny_task import model_bits


def test_same_seed_same_bits_with_two_threads(task, tmp_path):
    """With the shipped model, whose matrices are large enough to be shared among threads."""
    words = ["train", "--threads", "2", "--weighting", "table", "--bound", "clip"]
    words += ["--steps", "2", "--batch-size", "12", "--meta-batch-size", "12", "--upper-start", "1"]
    words += ["--loss-target", "pairs", "--order", "lower-first", "--no-progress"]
    words += ["--system-prompt", "judge each step of the solution"]
    for name in ("train", "meta", "test"):
        words += [f"--{name}-file", str(task.data / f"{name}.jsonl")]
    runs = [tmp_path / name for name in ("one", "other")]
    for run in runs:
        subprocess.run(
            [sys.executable, "-m", "recipes", *words, "--output-dir", str(run)],
            check=True,
            capture_output=True,
            env=os.environ | {"OMP_NUM_THREADS": "2"},
        )
    assert model_bits(runs[0]) == model_bits(runs[1])
    for name in ("weights.jsonl", "log.jsonl", "test_questions.jsonl"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()
