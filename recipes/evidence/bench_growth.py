"""How the start of ``train`` and the memory of ``score`` grow with the rows of a file.

Run by ``python -m recipes.evidence.bench_growth``.

Writes files of text rows (4 steps of some ten words, 10⁴ to 10⁶ rows by default), and for each runs
``train --weighting table`` on it up to the end of its first step, and ``score`` on files of other
sizes, each in a process of its own with the embedded model and one thread. Reported are processor
seconds from the start of the command, and the peak resident memory beyond that of the loaded model.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from recipes.models.loading import load_model
from recipes.options.parse import train_options
from recipes.options.use import ScoreOptions
from recipes.run.errors import reported
from recipes.run.files import check_writable, write_json
from recipes.run.provenance import environment, machine
from recipes.train.training import run_training
from recipes.use.score import run_score

_WORDS = (
    "red blue circle square count row column left right number sum two three four five add we see "
    "so the answer is there are"
)
_META_ROWS = 400


def text_rows(rows: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield rows with labels, domain, group and answer, some 430 bytes of JSON each."""
    rng = random.Random(seed)
    words = _WORDS.split()
    sentences = [" ".join(rng.choices(words, k=rng.randint(6, 14))) for _ in range(2000)]
    for row in range(rows):
        steps = [
            {"text": rng.choice(sentences), "label": "+" if rng.random() < 0.8 else "-"}
            for _ in range(rng.randint(2, 6))
        ]
        yield {
            "id": f"row-{row}",
            "question": f"{rng.choice(sentences)}?",
            "steps": steps,
            "domain": f"d{row % 5}",
            "group": f"q{seed}-{row // 8}",
            "answer": str(rng.randint(0, 9)),
            "correct": rng.random() < 0.5,
        }


def write_rows(path: Path, rows: int, seed: int = 0) -> Path:
    """Write ``text_rows`` as a JSONL file."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in text_rows(rows, seed))
    return path


def peak_bytes() -> int:
    """Return the peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def measure_train(file: Path, folder: Path) -> dict[str, Any]:
    """Train one step on ``file``; return the figures at the end of that step."""
    options = train_options(
        train_file=str(file),
        meta_file=str(write_rows(folder / "meta.jsonl", _META_ROWS, seed=1)),
        output_dir=str(folder / "run"),
        weighting="table",
        initial_loss=False,
        threads=1,
        steps=1,
        batch_size=8,
        upper_start=0,
        meta_batch_size=8,
        log_every=1,
        progress=False,
    )
    load_model(options)  # so that what is loaded with the first model is not counted
    before, started = peak_bytes(), time.process_time()
    figures: dict[str, Any] = {}

    def logged(step: int) -> None:
        figures["cpu_seconds"] = round(time.process_time() - started, 1)
        figures["bytes_beyond_model"] = peak_bytes() - before
        figures["peak_bytes"] = peak_bytes()

    run_training(options, logged)
    return figures


def measure_score(file: Path, folder: Path) -> dict[str, Any]:
    """Score ``file``; return the figures of the whole command."""
    options = ScoreOptions(file=str(file), output=str(folder / "scores.jsonl"), threads=1)
    load_model(options)
    before, started = peak_bytes(), time.process_time()
    run_score(options)
    return {
        "cpu_seconds": round(time.process_time() - started, 1),
        "bytes_beyond_model": peak_bytes() - before,
        "peak_bytes": peak_bytes(),
    }


_MEASURES = {"train": measure_train, "score": measure_score}


def measured(command: str, rows: int) -> dict[str, Any]:
    """Measure a command on a file of ``rows`` rows in a process of its own.

    Raises:
        subprocess.CalledProcessError: The command failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = write_rows(Path(folder) / "rows.jsonl", rows)
        words = [sys.executable, "-m", "recipes.evidence.bench_growth", "--measure", command]
        figures = Path(folder) / "figures.json"
        subprocess.run(
            [*words, str(file), "--output", str(figures)], check=True, stdout=subprocess.DEVNULL
        )
        found: dict[str, Any] = json.loads(figures.read_text(encoding="utf-8"))
        return {"command": command, "rows": rows, "file_bytes": file.stat().st_size, **found}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the files, measure, and print and store the figures."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.evidence.bench_growth", description=__doc__
    )
    parser.add_argument("--train-rows", type=int, nargs="*", default=[10**4, 10**5, 10**6])
    parser.add_argument("--score-rows", type=int, nargs="*", default=[2_000, 8_000])
    parser.add_argument("--output", default="results/bench_growth.json")
    parser.add_argument("--measure", nargs=2, metavar=("COMMAND", "FILE"), help="in this process")
    given = parser.parse_args(arguments)
    check_writable("--output", Path(given.output))
    if given.measure is not None:
        command, file = given.measure
        with tempfile.TemporaryDirectory() as folder:
            write_json(Path(given.output), _MEASURES[command](Path(file), Path(folder)))
        return
    cases = [("train", rows) for rows in given.train_rows]
    cases += [("score", rows) for rows in given.score_rows]
    rows = []
    for command, count in cases:
        rows.append(measured(command, count))
        print(
            f"{command:<6}{count:>10,} rows {rows[-1]['cpu_seconds']:>8.1f} s of computing"
            f"{rows[-1]['bytes_beyond_model'] / 1e6:>8.0f} MB beyond the model"
        )
    words = sys.argv[1:] if arguments is None else arguments
    named = " ".join(["python -m recipes.evidence.bench_growth", *words])
    results = {"rows": rows, "machine": machine(), "environment": environment()}
    write_json(Path(given.output), results | {"command": named})


if __name__ == "__main__":
    sys.exit(reported("recipes.evidence.bench_growth", main))
