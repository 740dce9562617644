"""``data validate`` on a file as large as VisualPRM400K.

Run by ``python -m recipes.evidence.bench_validate``.

Writes a synthetic file (``visualprm_rows``: conversations as VisualPRM's converter writes them,
400,000 rows by default, with small pictures) to a temporary folder, checks it by the command in a
process of its own, and reports seconds and peak resident memory of that process.
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

from PIL import Image

from recipes.run.errors import reported
from recipes.run.files import check_writable, write_json
from recipes.run.provenance import environment, machine

_SYSTEM = (
    "You are an advanced AI assistant, designed to serve as a process supervision model. " * 11
)
_WORDS = (
    "the angle of a triangle is equal to sum radius circle point line area length we find that "
    "therefore since given figure shows value chart bar left right total first second answer"
)


def visualprm_rows(rows: int, images: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield rows like VisualPRM's converter: id -1, one image, 4 to 12 steps, 9 of 10 right."""
    rng = random.Random(seed)
    words = _WORDS.split()
    sentences = [" ".join(rng.choices(words, k=rng.randint(12, 40))) for _ in range(4000)]
    for row in range(rows):
        turns = [{"from": "system", "value": _SYSTEM}]
        for step in range(rng.randint(4, 12)):
            text = f"{rng.choice(sentences)} = {rng.randint(0, 10**6)}"
            if step == 0:
                question = f"<image>\n{rng.choice(sentences)}, case {row}?"
                text = f"### Question:\n{question}\n\n### Solution Process:\n{text}"
            turns.append({"from": "human", "value": text})
            turns.append({"from": "gpt", "value": "+" if rng.random() < 0.9 else "-"})
        image = f"images/{row % images:06d}.png"
        yield {"id": -1, "image": image, "conversations": turns}


def write_visualprm(path: Path, rows: int, images: int, *, array: bool = False) -> Path:
    """Write ``visualprm_rows`` as a JSONL file, or as one JSON array."""
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(visualprm_rows(rows, images)):
            if array:
                file.write("[" if number == 0 else ",\n")
            file.write(json.dumps(row))
            if not array:
                file.write("\n")
        if array:
            file.write("]\n")
    return path


def write_images(folder: Path, count: int) -> None:
    """Write the pictures of ``visualprm_rows``, 8 by 8 pixels, each of its own colour."""
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        colour = (number % 256, number // 256 % 256, 0)
        Image.new("RGB", (8, 8), colour).save(folder / "images" / f"{number:06d}.png")


def measured(file: Path) -> dict[str, Any]:
    """Check ``file`` in a process of its own; return seconds, peak resident bytes and results.

    ``cpu_seconds`` is processor time; ``seconds`` is elapsed time, which is longer on a busy
    machine.

    Raises:
        subprocess.CalledProcessError: The check failed or reported errors.
    """
    path = file.with_suffix(".findings.json")
    command = [sys.executable, "-m", "recipes", "data", "validate", str(file), "--json", str(path)]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # There is no other child process.
    figures = json.loads(path.read_text(encoding="utf-8"))
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_bytes": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "file_bytes": file.stat().st_size,
        **{name: figures[name] for name in ("rows", "steps", "missing_images", "constant_id")},
        "errors": len(figures["errors"]),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the file, check it, and print and store the figures."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.evidence.bench_validate", description=__doc__
    )
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--images", type=int, default=5_000, help="different pictures")
    parser.add_argument("--array", action="store_true", help="one JSON array in place of JSONL")
    parser.add_argument("--output", default="results/bench_validate.json")
    given = parser.parse_args(arguments)
    check_writable("--output", Path(given.output))
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), given.images)
        name = "train.json" if given.array else "train.jsonl"
        file = write_visualprm(Path(folder) / name, given.rows, given.images, array=given.array)
        figures = {"array": given.array, "images": given.images, **measured(file)}
    print(
        f"{figures['rows']:,} rows, {figures['steps']:,} steps, "
        f"{figures['file_bytes'] / 1e9:.2f} GB: "
        f"{figures['seconds']:.0f} s ({figures['cpu_seconds']:.0f} s of computing), "
        f"{figures['peak_bytes'] / 1e6:.0f} MB"
    )
    write_json(Path(given.output), figures | {"machine": machine(), "environment": environment()})


if __name__ == "__main__":
    sys.exit(reported("recipes.evidence.bench_validate", main))
