"""Synthetic VisualPRM400K files of any size: ``python -m ...visualprm_file ROWS FILE``."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

SYSTEM = "You are an advanced AI assistant, designed to serve as a process supervision model. " * 11
TEXT = (
    "the angle of a triangle is equal to sum radius circle point line area length we find that "
    "therefore since given figure shows value chart bar left right total first second answer"
)


def visualprm_rows(rows: int, images: int, seed: int = 0):
    """Rows as VisualPRM's converter writes them: id -1, one image, 4 to 12 steps."""
    rng = random.Random(seed)
    words = TEXT.split()
    sentences = [" ".join(rng.choices(words, k=rng.randint(12, 40))) for _ in range(4000)]
    for row in range(rows):
        turns = [{"from": "system", "value": SYSTEM}]
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
    """Write a JSONL file, or one JSON array."""
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


if __name__ == "__main__":
    write_visualprm(Path(sys.argv[2]), int(sys.argv[1]), images=2000, array="--array" in sys.argv)
