"""Solutions of the Game of 24 as training, meta and test files of the project.

The source holds, for each of 100 puzzles, 100 solutions that GPT-4 wrote
(princeton-nlp/tree-of-thought-llm, MIT). An exact search over fractions gives each step two labels:
``valid`` for a legal move with right arithmetic after legal moves, and ``reach`` for a valid move
after which 24 can still be reached. Almost all first and second steps are valid, so the position
nearly determines that label. A step therefore counts as right if its ``reach`` is true.
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
    """The numbers of puzzles and solutions that are used.

    Attributes:
        test_puzzles: The number of puzzles for which solutions are selected.
        meta_puzzles: The number of puzzles of the upper level.
        candidates: The number of solutions of each test and meta puzzle.
        train_solutions: The number of solutions of other puzzles, at most half of them right.
    """

    test_puzzles: int = 16
    meta_puzzles: int = 10
    candidates: int = 8
    train_solutions: int = 160


def by_reach(example: StepExample) -> StepExample:
    """Return the example with ``reach`` as its step labels.

    Raises:
        DataError: A step has no label ``reach``.
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
    """Return training, meta and test examples, which share no puzzle.

    Test and meta puzzles are drawn among those with right and wrong solutions. For each,
    ``candidates`` of its solutions are drawn, repeatedly until they include right and wrong ones.
    This is a random draw, given that the selection matters. The training set holds solutions of the
    other puzzles, every text once. Half of them are right if there are enough; the whole source has
    102 different right ones.

    Raises:
        ValueError: There are too few puzzles with right and wrong solutions.
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
    """Return the rows without repeated texts."""
    return list({tuple(step.text for step in row.steps): row for row in reversed(rows)}.values())


def write_parts(source: Path, directory: Path, sizes: Sizes, seed: int = 0) -> dict[str, int]:
    """Write ``train.jsonl``, ``meta.jsonl`` and ``test.jsonl``; return their numbers of rows.

    Raises:
        FileNotFoundError: ``source`` does not exist.
        DataError: A record cannot be used.
        ValueError: ``split`` raises it.
    """
    examples = [by_reach(example) for example in read_examples(source, format="game24")]
    parts = split(examples, sizes, seed)
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        write_jsonl(directory / f"{name}.jsonl", rows)
    return {name: len(rows) for name, rows in parts.items()}
