"""A labelled source of the Game of 24 with a few puzzles."""

from __future__ import annotations

import json
from pathlib import Path

RIGHT = 3
"""How many candidates of a puzzle are right, but for those of the last two puzzles."""


def write_source(path: Path, puzzles: int = 6, reach=lambda number: number % 2) -> Path:
    """Eight candidates a puzzle, the first ones right, every other wrong one a cheat."""
    rows = []
    for puzzle in range(puzzles):
        candidates = []
        for number in range(8):
            right = number < RIGHT and puzzle < puzzles - 2
            left = "24" if right or number % 2 else "5"
            first = {"text": f"{number} + {puzzle} = 9 (left: {left})", "kind": "step", "valid": 1}
            text = f"Answer: {number} = {left}"
            answer = {"text": text, "kind": "answer", "valid": int(right)}
            steps = [{**first, "reach": reach(number)}, {**answer, "reach": int(right)}]
            candidates.append({"steps": steps, "correct": int(right)})
        candidates.append(candidates[-1])  # one text twice
        rows.append({"idx": 900 + puzzle, "puzzle": f"1 2 3 {puzzle}", "candidates": candidates})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
