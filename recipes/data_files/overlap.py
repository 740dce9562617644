"""Questions and solutions that two sets (train, meta, test) share, found in two passes.

The first pass is part of the check itself and keeps a hash of every question's words. The second
compares the images, too, and reads only the rows whose words occur in another set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from prm.data.questions import Questions, digest, words_of
from prm.schema import StepExample
from recipes.data_files.findings import Findings, Tally

Rows = Iterator[tuple[int, StepExample]]
"""Pairs (location, example) of all usable examples of a file; see ``Findings.location``."""


class Overlap:
    """The overlap of two sets, as locations in the second.

    Attributes:
        first: The name of the first set.
        second: The name of the second set.
        questions: The rows whose question (words and content of the images) occurs in the first.
        solutions: The rows among these whose steps occur in the first, too.
    """

    def __init__(self, first: str, second: str) -> None:
        self.first, self.second = first, second
        self.questions, self.solutions = Tally(), Tally()


def overlaps(
    findings_of: Mapping[str, Findings], rows_of: Mapping[str, Sequence[Rows]]
) -> list[Overlap]:
    """Return the overlap of each pair of sets, in the order of ``findings_of``.

    Args:
        findings_of: The findings of every set in the first pass.
        rows_of: A generator per file of every set for the second pass, used only where needed.
    """
    pairs = list(combinations(findings_of, 2))
    wanted = {
        name: set().union(*(_common(findings_of, pair) for pair in pairs if name in pair))
        for name in findings_of
    }
    questions = Questions()
    keys: dict[str, list[tuple[int, int, int]]] = {}
    for name, words in wanted.items():
        keys[name] = []
        for rows in rows_of[name] if words else ():
            for location, example in rows:
                if digest(words_of(example.question)) in words:
                    keys[name].append((*_keys(example, questions), location))
    return [_overlap(pair, keys) for pair in pairs]


def _common(findings_of: Mapping[str, Findings], pair: tuple[str, str]) -> set[int]:
    return findings_of[pair[0]].words & findings_of[pair[1]].words


def _keys(example: StepExample, questions: Questions) -> tuple[int, int]:
    """Return hashes of question and solution."""
    question = questions.key(example)
    steps = ("\n".join(words_of(step.text)) for step in example.steps)
    return question, digest((str(question), *steps))


def _overlap(pair: tuple[str, str], keys: Mapping[str, Sequence[tuple[int, int, int]]]) -> Overlap:
    overlap = Overlap(*pair)
    questions = {question for question, _, _ in keys[pair[0]]}
    solutions = {solution for _, solution, _ in keys[pair[0]]}
    for question, solution, location in keys[pair[1]]:
        if question in questions:
            overlap.questions.add(location)
        if solution in solutions:
            overlap.solutions.add(location)
    return overlap
