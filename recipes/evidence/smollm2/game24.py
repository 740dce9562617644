"""Solutions of the Game of 24 as the files of the comparison.

The source holds, for each of 100 puzzles, 100 solutions that GPT-4 wrote
(princeton-nlp/tree-of-thought-llm, MIT). An exact search over fractions gives each step two labels:
``valid`` for a legal move with right arithmetic after legal moves, and ``reach`` for a valid move
after which 24 can still be reached. Almost all first and second steps are valid, so the position
nearly determines that label. A step therefore counts as right if its ``reach`` is true.

Only 49 puzzles have right and wrong solutions, so that a selection matters. Nine of them are the
development set of every seed, and never a test set. Of the others each seed tests one half, and
learns from the other half and from the 51 puzzles without a right solution. Seeds 2 k and 2 k + 1
test the two halves of one division: together all 40 puzzles, each once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from prm.data.reader import read_examples
from prm.schema import DataError, StepExample
from recipes.evidence.smollm2.files import unlabelled, write_parts
from recipes.evidence.smollm2.sources import Mixture, beginnings, judged

FILE = "candidates.jsonl"

Puzzles = dict[str, list[StepExample]]


@dataclass(frozen=True)
class Sizes:
    """The numbers of puzzles and solutions that are used.

    Attributes:
        dev_puzzles: The number of puzzles of the development set.
        meta_puzzles: The number of puzzles of the upper level.
        candidates: The number of solutions of each development and test puzzle.
        meta_solutions: The number of solutions of each meta puzzle, at most half of them right.
        train_solutions: The number of labelled solutions.
        cold_solutions: The number of further ones, of the cold start.
        right: The share of right solutions among the labelled ones, if there are enough.
        copies: How often the text of a right solution may be among them; of a wrong one, once.
    """

    dev_puzzles: int = 9
    meta_puzzles: int = 8
    candidates: int = 8
    meta_solutions: int = 6
    train_solutions: int = 160
    cold_solutions: int = 80
    right: float = 0.25
    copies: int = 6


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
    examples: Sequence[StepExample], sizes: Sizes = Sizes(), seed: int = 0
) -> dict[str, list[StepExample]]:
    """Return the rows of every file of a seed; the sets share no puzzle.

    ``train`` and ``cold-start`` hold labels of mixed quality, other solutions of the same puzzles,
    and ``clean`` the verified rows of ``train``. ``meta`` holds outcomes only. For each puzzle of
    ``dev`` and ``test`` solutions are drawn, repeatedly until they include right and wrong ones:
    a random draw, given that the selection matters.

    Raises:
        ValueError: There are too few puzzles with right and wrong solutions, or too few solutions.
    """
    puzzles: Puzzles = {}
    for example in examples:
        puzzles.setdefault(str(example.group), []).append(example)
    mixed = [name for name, rows in puzzles.items() if len({row.correct for row in rows}) == 2]
    halves = (len(mixed) - sizes.dev_puzzles) // 2
    if halves <= sizes.meta_puzzles:
        wanted = sizes.dev_puzzles + 2 * (sizes.meta_puzzles + 1)
        raise ValueError(
            f"expected at least {wanted} puzzles with right and wrong solutions, found "
            f"{len(mixed)}; give smaller sizes"
        )
    fixed = Random(0)
    dev = fixed.sample(mixed, sizes.dev_puzzles)
    dev_rows = _candidates(puzzles, dev, sizes.candidates, fixed)
    others = [name for name in mixed if name not in dev]
    Random(seed // 2).shuffle(others)
    test = others[:halves] if seed % 2 == 0 else others[halves:]
    rest = [name for name in others if name not in test]
    rng = Random(seed)
    meta = rng.sample(rest, sizes.meta_puzzles)
    learned = [name for name in puzzles if name not in {*dev, *test, *meta}]
    count = sizes.train_solutions + sizes.cold_solutions
    drawn = _labelled_rows(puzzles, learned, count, sizes, rng)
    train = drawn[: sizes.train_solutions]
    return {
        "train": train,
        "cold-start": drawn[sizes.train_solutions :],
        "clean": [row for row in train if row.extra["source"] == "verified"],
        "meta": [row for name in meta for row in _outcomes(puzzles[name], sizes, rng)],
        "dev": dev_rows,
        "test": _candidates(puzzles, test, sizes.candidates, rng),
    }


def _candidates(
    puzzles: Puzzles, names: Sequence[str], count: int, rng: Random
) -> list[StepExample]:
    return [row for name in names for row in _mixed_draw(puzzles[name], count, rng)]


def _mixed_draw(rows: Sequence[StepExample], count: int, rng: Random) -> list[StepExample]:
    while True:
        drawn = rng.sample(rows, count)
        if len({row.correct for row in drawn}) == 2:
            return drawn


def _labelled_rows(
    puzzles: Puzzles,
    names: Sequence[str],
    count: int,
    sizes: Sizes,
    rng: Random,
) -> list[StepExample]:
    """Return ``count`` solutions in random order, each judged by one source."""
    rows = [row for name in names for row in _few_alike(puzzles[name], sizes.copies)]
    right = [row for row in rows if row.correct]
    wrong = [row for row in rows if not row.correct]
    many = min(round(count * sizes.right), len(right))
    if len(wrong) < count - many:
        raise ValueError(
            f"expected at least {count - many} different wrong solutions of the {len(names)} "
            f"puzzles to learn from, found {len(wrong)}; give smaller sizes"
        )
    drawn = rng.sample(right, many) + rng.sample(wrong, count - many)
    rng.shuffle(drawn)
    met = {name: beginnings(puzzles[name]) for name in names}
    return [
        judged(row, source, met[str(row.group)])
        for row, source in zip(drawn, Mixture().of(count, rng), strict=True)
    ]


def _few_alike(rows: Sequence[StepExample], copies: int) -> list[StepExample]:
    """Return the rows with each text ``copies`` times at most if it is right, else once."""
    seen: Counter[tuple[str, ...]] = Counter()
    kept = []
    for row in rows:
        text = tuple(step.text for step in row.steps)
        if seen[text] < (copies if row.correct else 1):
            kept.append(row)
        seen[text] += 1
    return kept


def _outcomes(rows: Sequence[StepExample], sizes: Sizes, rng: Random) -> list[StepExample]:
    """Return different solutions of a puzzle without step labels, right ones up to half."""
    unlike = _few_alike(rows, 1)
    right = [row for row in unlike if row.correct]
    wrong = [row for row in unlike if not row.correct]
    chosen = rng.sample(right, min(sizes.meta_solutions // 2, len(right)))
    chosen += rng.sample(wrong, min(sizes.meta_solutions - len(chosen), len(wrong)))
    return [unlabelled(row) for row in chosen]


def write_files(
    source: Path, directory: Path, *, seed: int = 0, sizes: Sizes = Sizes()
) -> dict[str, int]:
    """Write the files of a seed into a new directory, as ``write_parts`` does.

    Raises:
        FileNotFoundError: ``source`` does not exist.
        DataError: A record cannot be used.
        ValueError: ``split`` raises it.
    """
    examples = [by_reach(example) for example in read_examples(source, format="game24")]
    return write_parts(split(examples, sizes, seed=seed), directory)
