"""Solutions of school problems with first errors found by people, as the files of the comparison.

The source is ``gsm_process.jsonl`` of MathCheck (PremiLab-Math/MathCheck, format ``mathcheck``):
129 groups of four wordings of one problem of GSM8K, three solutions each: one with its first error
marked, which counts as wrong, and others that are right throughout, or wrong without a mark.
Nothing was chosen on it: it shows whether what was chosen elsewhere holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from prm.data.reader import read_examples
from prm.schema import StepExample
from recipes.evidence.smollm2.files import unlabelled, write_parts

FILE = "gsm_process.jsonl"
SOURCES = ("verified", "estimated")
"""Where labels come from: people; or a Monte-Carlo estimate, see ``estimated``."""

MISSED = 0.1
"""How often no completion of a right step is right."""
PASSED = 0.5
"""How often some completion recovers from a wrong step."""


@dataclass(frozen=True)
class Sizes:
    """The numbers of groups and solutions that are used.

    Attributes:
        test_groups: The number of groups of the test set.
        dev_groups: The number of groups of the development set.
        meta_groups: The number of groups of the upper level.
        train_solutions: The number of labelled solutions.
        cold_solutions: The number of further ones, of the cold start.
        verified: The share of solutions with the labels of people.
    """

    test_groups: int = 40
    dev_groups: int = 12
    meta_groups: int = 8
    train_solutions: int = 160
    cold_solutions: int = 80
    verified: float = 0.5


def estimated(example: StepExample, rng: Random) -> StepExample:
    """Return the example with labels as a hard Monte-Carlo estimate gives them.

    Step by step, a right one is "-" with probability ``MISSED`` and a wrong one "+" with
    probability ``PASSED``. After the first error of people every step is wrong. After the first "-"
    nothing is known.
    """
    labels: list[float | None] = []
    right = True
    for step in example.steps:
        right = right and step.label == 1
        passes = rng.random() >= MISSED if right else rng.random() < PASSED
        known = not labels or labels[-1] == 1
        labels.append(float(passes) if known else None)
    steps = (replace(s, label=label) for s, label in zip(example.steps, labels, strict=True))
    return replace(example, steps=tuple(steps))


def split(
    examples: Sequence[StepExample], sizes: Sizes = Sizes(), seed: int = 0
) -> dict[str, list[StepExample]]:
    """Return the rows of every file of a seed; the sets share no group.

    ``train`` and ``cold-start`` hold labels of mixed quality, ``clean`` the rows of ``train`` with
    labels of people. ``meta``, ``dev`` and ``test`` hold the questions whose solutions are right
    and wrong, with their outcomes.

    Raises:
        ValueError: There are too few groups or labelled solutions.
    """
    rng = Random(seed)
    groups = sorted({str(example.group) for example in examples})
    rng.shuffle(groups)
    ends = (sizes.test_groups, sizes.dev_groups, sizes.meta_groups)
    test, dev, meta = (
        set(groups[sum(ends[:number]) : sum(ends[: number + 1])]) for number in range(3)
    )
    learned = [
        example
        for example in examples
        if example.group not in test | dev | meta and example.steps[0].label is not None
    ]
    count = sizes.train_solutions + sizes.cold_solutions
    if len(learned) < count:
        raise ValueError(
            f"expected at least {count} labelled solutions to learn from, found {len(learned)}; "
            "give smaller sizes"
        )
    people = round(count * sizes.verified)
    drawn = [
        _sourced(example, "verified" if number < people else "estimated", rng)
        for number, example in enumerate(rng.sample(learned, count))
    ]
    rng.shuffle(drawn)
    train = drawn[: sizes.train_solutions]
    return {
        "train": train,
        "cold-start": drawn[sizes.train_solutions :],
        "clean": [row for row in train if row.extra["source"] == "verified"],
        "meta": [unlabelled(row) for row in _mixed(examples, meta)],
        "dev": _mixed(examples, dev),
        "test": _mixed(examples, test),
    }


def _sourced(example: StepExample, source: str, rng: Random) -> StepExample:
    given = example if source == "verified" else estimated(example, rng)
    wrong = sum(
        None not in (one.label, other.label) and one.label != other.label
        for one, other in zip(given.steps, example.steps, strict=True)
    )
    return replace(given, correct=None, extra={"source": source, "wrong_labels": wrong})


def _mixed(examples: Sequence[StepExample], groups: set[str]) -> list[StepExample]:
    """Return the solutions of the questions of some groups that have right and wrong ones."""
    questions: dict[str, list[StepExample]] = {}
    for example in examples:
        if example.group in groups:
            row = replace(example, correct=bool(example.correct), extra={})
            questions.setdefault(example.question, []).append(row)
    return [
        replace(row, group=f"question-{number}")
        for number, rows in enumerate(questions.values())
        if {row.correct for row in rows} == {True, False}
        for row in rows
    ]


def write_files(
    source: Path, directory: Path, *, seed: int = 0, sizes: Sizes = Sizes()
) -> dict[str, int]:
    """Write the files of a seed into a new directory, as ``write_parts`` does.

    Raises:
        FileNotFoundError: ``source`` does not exist.
        DataError: A record cannot be used.
        ValueError: ``split`` raises it.
    """
    examples = list(read_examples(source, format="mathcheck"))
    return write_parts(split(examples, sizes, seed=seed), directory)
