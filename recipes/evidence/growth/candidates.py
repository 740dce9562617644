"""Memory and time of ``evaluate`` against the candidates of a file whose scores are there.

Eight candidates a question, 2 to 6 steps each with labels. Each size has a process of its own.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prm.aggregations import AGGREGATIONS
from prm.digests import write_digest
from recipes.evidence.bench_growth import peak_bytes, text_rows
from recipes.options.use import EvaluateOptions
from recipes.use.evaluate import run_evaluate
from recipes.use.scores_file import ScoredSolution

SIZES = (10**3, 10**4, 10**5)
_WORDS = (sys.executable, "-m", "recipes.evidence.growth.candidates")


def write_files(folder: Path, rows: int) -> tuple[Path, Path]:
    """Write candidates and a scores file of random scores; return their paths."""
    draw = random.Random(1)
    file, scores = folder / "candidates.jsonl", folder / "scores.jsonl"
    with file.open("w", encoding="utf-8") as data, scores.open("w", encoding="utf-8") as scored:
        for row in text_rows(rows):
            data.write(json.dumps(row) + "\n")
            values = tuple(round(draw.random(), 6) for _ in row["steps"])
            mean = sum(values) / len(values)
            known = {name: row[name] for name in ("group", "answer", "correct")}
            line = ScoredSolution(row["id"], values, dict.fromkeys(AGGREGATIONS, mean), **known)
            scored.write(line.line())
    write_digest(scores)
    return file, scores


def measure(file: str, scores: str, output: str) -> dict[str, Any]:
    """Evaluate in this process; return its figures."""
    options = EvaluateOptions(file=file, scores=scores, output=output, threads=1)
    before, started = peak_bytes(), time.process_time()
    run_evaluate(options)
    return {
        "cpu_ms": round(1000 * (time.process_time() - started), 1),
        "peak_bytes": peak_bytes(),
        "bytes_beyond_start": peak_bytes() - before,
    }


def measured(sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Return the figures of the command for each number of candidates.

    Raises:
        subprocess.CalledProcessError: The command failed.
    """
    found = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            file, scores = write_files(folder, size)
            kept = folder / "figures.json"
            words = [*_WORDS, *map(str, (file, scores, folder / "results.json", kept))]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
            found.append({"size": size, **json.loads(kept.read_text(encoding="utf-8"))})
    for row, before in zip(found[1:], found, strict=False):
        more = row["peak_bytes"] - before["peak_bytes"]
        row["bytes_per_row"] = round(more / (row["size"] - before["size"]))
    return found


if __name__ == "__main__":
    Path(sys.argv[4]).write_text(json.dumps(measure(*sys.argv[1:4])), encoding="utf-8")
