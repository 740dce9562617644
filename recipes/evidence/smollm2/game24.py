"""Solutions of the Game of 24 as training, meta and test files of the project.

The source holds, for each of 100 puzzles, 100 solutions that GPT-4 wrote
(princeton-nlp/tree-of-thought-llm, MIT), with two labels a step by exact search over fractions:
``valid``, a legal move with right arithmetic after legal moves, and ``reach``, valid and 24 can
still be reached. Almost all first and second steps are valid, so a step's place decides that label;
here a step is right where ``reach`` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from prm.data.reader import read_examples, write_jsonl
from prm.schema import DataError, StepExample

FILE = "candidates.jsonl"


@dataclass(frozen=True)
class Sizes:
    """How much of the source is used.

    Attributes:
        test_puzzles: Puzzles that solutions are selected for.
        meta_puzzles: Puzzles of the upper level.
        candidates: Solutions of each of these.
        train_solutions: Solutions of the other puzzles, at most half of them right.
    """

    test_puzzles: int = 16
    meta_puzzles: int = 10
    candidates: int = 8
    train_solutions: int = 160


def by_reach(example: StepExample) -> StepExample:
    """The example with ``reach`` as its step labels.

    Raises:
        DataError: A step lacks it.
    """
    reach = example.extra["reach"]
    if any(value not in (0, 1) for value in reach):
        raise DataError(
            expected="0 or 1 as reach of every step", found=f"{reach}", example=example.id
        )
    steps = (
        replace(step, label=float(value)) for step, value in zip(example.steps, reach, strict=True)
    )
    return replace(example, steps=tuple(steps), extra={})


def split(
    examples: Sequence[StepExample], sizes: Sizes, seed: int = 0
) -> dict[str, list[StepExample]]:
    """Training, meta and test examples; no two of them share a puzzle.

    Test and meta puzzles are drawn among those with right and wrong solutions. Of each,
    ``candidates`` solutions are drawn from all of its solutions, again until there are right and
    wrong ones among them: a draw by chance, given that there is something to select. The training
    set holds solutions of the other puzzles, every text once, half of them right if there are so
    many (of the whole source 102 different ones are).

    Raises:
        ValueError: Too few puzzles with right and wrong solutions.
    """
    rng = Random(seed)
    puzzles: dict[str, list[StepExample]] = {}
    for example in examples:
        puzzles.setdefault(str(example.group), []).append(example)
    mixed = [name for name, rows in puzzles.items() if len({row.correct for row in rows}) == 2]
    wanted = sizes.test_puzzles + sizes.meta_puzzles
    if len(mixed) <= wanted:
        raise ValueError(
            f"expected more than {wanted} puzzles with right and wrong solutions, found "
            f"{len(mixed)}; give smaller sizes"
        )
    held_out = rng.sample(mixed, wanted)
    parts = {"test": held_out[: sizes.test_puzzles], "meta": held_out[sizes.test_puzzles :]}
    held_out_rows = {
        name: [row for key in names for row in _mixed_draw(puzzles[key], sizes.candidates, rng)]
        for name, names in parts.items()
    }
    others = [row for key, rows in puzzles.items() if key not in held_out for row in _unlike(rows)]
    right = [row for row in others if row.correct]
    wrong = [row for row in others if not row.correct]
    count = min(sizes.train_solutions // 2, len(right))
    train = rng.sample(right, count) + rng.sample(wrong, sizes.train_solutions - count)
    rng.shuffle(train)
    return {"train": train, **held_out_rows}


def _mixed_draw(rows: Sequence[StepExample], count: int, rng: Random) -> list[StepExample]:
    while True:
        drawn = rng.sample(rows, count)
        if len({row.correct for row in drawn}) == 2:
            return drawn


def _unlike(rows: Sequence[StepExample]) -> list[StepExample]:
    """The first of every text."""
    return list({tuple(step.text for step in row.steps): row for row in reversed(rows)}.values())


def write_parts(source: Path, directory: Path, sizes: Sizes, seed: int = 0) -> dict[str, int]:
    """Write ``train.jsonl``, ``meta.jsonl`` and ``test.jsonl``; returns their rows by name.

    Raises:
        FileNotFoundError: No ``source``.
        DataError: A record that cannot be used.
        ValueError: See ``split``.
    """
    examples = [by_reach(example) for example in read_examples(source, format="game24")]
    parts = split(examples, sizes, seed)
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        write_jsonl(directory / f"{name}.jsonl", rows)
    return {name: len(rows) for name, rows in parts.items()}
