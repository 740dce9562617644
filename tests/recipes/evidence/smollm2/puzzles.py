"""A labelled source of the Game of 24 with a few puzzles."""

from __future__ import annotations

import json
from pathlib import Path


def write_source(path: Path, puzzles: int = 6, reach=lambda number: number % 2) -> Path:
    """Six candidates a puzzle, the first two right (but those of the last two puzzles)."""
    rows = []
    for puzzle in range(puzzles):
        candidates = []
        for number in range(6):
            right = number < 2 and puzzle < puzzles - 2
            first = {"text": f"move {number} of {puzzle}", "kind": "step", "valid": 1}
            answer = {"text": f"Answer: {number}", "kind": "answer", "valid": int(right)}
            steps = [{**first, "reach": reach(number)}, {**answer, "reach": int(right)}]
            candidates.append({"steps": steps, "correct": int(right)})
        candidates.append(candidates[-1])  # one text twice
        rows.append({"idx": 900 + puzzle, "puzzle": f"1 2 3 {puzzle}", "candidates": candidates})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
