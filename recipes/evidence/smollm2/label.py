"""The labelled source of the check from what is published.

Run by ``python -m recipes.evidence.smollm2.label``.

The repository princeton-nlp/tree-of-thought-llm (MIT) holds the solutions, in
``logs/game24/gpt-4_0.7_naive_cot_sample_100_start900_end1000.json``, and the puzzles, in the column
``Puzzles`` of ``24.csv`` (under ``src/tot/data/24``, before under ``data/24``):

    python -m recipes.evidence.smollm2.label LOG.json 24.csv --out data/game24/candidates.jsonl

Labels are exact: a move ``a op b = c (left: ...)`` is ``valid`` if every move before it is, a and b
are among the numbers that are left, c is a op b and the list is what is left then; ``reach``
if, moreover, 24 can be made of that list. Numbers are fractions, so that a rounded result is not
right; every pair and operation is tried. The answer is right where the repository's checker says
so.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

from prm.files import write_lines
from recipes.run.errors import reported

_MOVE = re.compile(r"(\S+) ([-+*/]) (\S+) = (\S+) \(left: ([^()]*)\)")
Numbers = tuple[Fraction, ...]


def after(left: Numbers, text: str) -> Numbers | None:
    """Return the sorted numbers after the move ``text``; None if it is not right and legal."""
    match = _MOVE.fullmatch(text.strip())
    if match is None:
        return None
    try:
        a, b, result = (Fraction(match[group]) for group in (1, 3, 4))
        listed = sorted(Fraction(word) for word in match[5].split())
    except (ValueError, ZeroDivisionError):
        return None
    rest = list(left)
    for number in (a, b):
        if number not in rest:
            return None
        rest.remove(number)
    if result not in [value for sign, value in _results(a, b) if sign == match[2]]:
        return None
    rest.append(result)
    return tuple(listed) if listed == sorted(rest) else None


@cache
def reaches(numbers: Numbers) -> bool:
    """Return whether 24 can be made from the sorted numbers, each used once."""
    if len(numbers) == 1:
        return numbers[0] == 24
    for i, a in enumerate(numbers):
        for j, b in enumerate(numbers):
            if i != j:
                rest = [number for k, number in enumerate(numbers) if k not in (i, j)]
                if any(reaches(tuple(sorted([*rest, value]))) for _, value in _results(a, b)):
                    return True
    return False


def _results(a: Fraction, b: Fraction) -> Iterator[tuple[str, Fraction]]:
    yield from (("+", a + b), ("-", a - b), ("*", a * b))
    if b:
        yield "/", a / b


def labelled(puzzle: str, lines: Sequence[str], correct: bool) -> list[dict[str, Any]]:
    """Return a solution's steps with their labels; a line "Answer: ..." has label ``correct``."""
    left: Numbers | None = tuple(sorted(Fraction(word) for word in puzzle.split()))
    steps = []
    for text in lines:
        if text.startswith("Answer"):
            kind, valid, reach = "answer", correct, correct
        else:
            kind = "step"
            left = None if left is None else after(left, text)
            valid = left is not None
            reach = left is not None and reaches(left)
        steps.append({"text": text, "kind": kind, "valid": int(valid), "reach": int(reach)})
    return steps


def rows(log: Sequence[Mapping[str, Any]], puzzles: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield a record of format ``game24`` per puzzle of the published log."""
    for entry in log:
        puzzle = puzzles[entry["idx"]]
        candidates = []
        for text, info in zip(entry["ys"], entry["infos"], strict=True):
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            lines = lines[1:] if lines[0].rstrip(":").lower() == "steps" else lines
            correct = info["r"] == 1
            steps = labelled(puzzle, lines, correct)
            candidates.append({"steps": steps, "correct": int(correct)})
        yield {"idx": entry["idx"], "puzzle": puzzle, "candidates": candidates}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the labelled file."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.evidence.smollm2.label",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("log", type=Path)
    parser.add_argument("puzzles", type=Path)
    parser.add_argument("--out", type=Path, default=Path("data/game24/candidates.jsonl"))
    given = parser.parse_args(arguments)
    with given.puzzles.open(encoding="utf-8", newline="") as file:
        puzzles = [row["Puzzles"] for row in csv.DictReader(file)]
    log = json.loads(given.log.read_text(encoding="utf-8"))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_lines(given.out, (json.dumps(row) + "\n" for row in rows(log, puzzles)))


if __name__ == "__main__":
    sys.exit(reported("recipes.evidence.smollm2.label", main))
