"""A solver with realistic, correlated mistakes.

Mistakes per *question* come from hard cells: every candidate misreads such a cell with the same
high probability and mostly as the same digit, so that a majority can be wrong together. Mistakes
per *candidate* are slips of arithmetic and readings of a neighbouring cell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from recipes.embedded.questions import Question, Step, apply, judged_by, solve
from recipes.embedded.sheets import CELLS, renamed

CONFUSABLE = {
    0: (6, 8), 1: (7, 4), 2: (7, 3), 3: (8, 5), 4: (9, 1),
    5: (6, 3), 6: (0, 8), 7: (1, 2), 8: (3, 0), 9: (4, 7),
}  # fmt: skip
"""For each digit, the digits that it is misread as, the likelier first."""


@dataclass(frozen=True)
class Difficulty:
    """The difficulty of one question, which all candidates share."""

    misread: Mapping[str, float]  # cell -> probability of misreading it
    taken_for: Mapping[str, int]  # cell -> the digit that it is usually taken for
    slip: float  # probability that one combination is off by one
    wrong_cell: float  # probability that a neighbouring cell is read instead
    other_end: float = 0.0  # probability that rows are counted from the wrong end

    def renamed(self) -> Difficulty:
        """Return the same for a solver that counts rows from the other end."""
        return replace(self, misread=renamed(self.misread), taken_for=renamed(self.taken_for))


def draw_difficulty(question: Question, rng: np.random.Generator) -> Difficulty:
    """Draw the difficulty of a question; half of the questions have one hard cell."""
    misread = dict.fromkeys(CELLS, 0.02)
    if rng.random() < 0.5:
        hard = question.cells[int(rng.integers(3))]
        misread[hard] = rng.uniform(0.40, 0.80)
    taken_for = {
        cell: CONFUSABLE[value][0 if rng.random() < 0.75 else 1]
        for cell, value in question.values.items()
    }
    return Difficulty(
        misread,
        taken_for,
        slip=rng.uniform(0.02, 0.15),
        wrong_cell=rng.uniform(0.01, 0.08),
        other_end=rng.uniform(0.25, 0.75),
    )


@dataclass(frozen=True)
class Careless:
    """The operations of one candidate, with mistakes by the question's difficulty."""

    question: Question
    difficulty: Difficulty
    rng: np.random.Generator

    def read(self, cell: str) -> int:
        """Return the value stated for ``cell``: right, misread, or that of another cell."""
        value = self.question.values[cell]
        if self.rng.random() < self.difficulty.misread[cell]:
            if self.rng.random() < 0.85:
                return self.difficulty.taken_for[cell]
            return CONFUSABLE[value][int(self.rng.integers(2))]
        if self.rng.random() < self.difficulty.wrong_cell:
            others = [other for other in CELLS if other != cell]
            return self.question.values[others[int(self.rng.integers(3))]]
        return value

    def combine(self, operation: str, left: int, right: int) -> int:
        """Return the value stated for the combination, which is right or off by one."""
        value = apply(operation, left, right)
        if self.rng.random() < self.difficulty.slip:
            if operation == "max":
                return min(left, right)
            return max(0, value + int(self.rng.choice([-2, -1, 1, 2])))
        return value


@dataclass(frozen=True)
class Attempt:
    """A candidate solution.

    Attributes:
        steps: Its steps, true or not by the right convention.
        answer: Its answer.
        seen: The question with the values as the solver's convention names them.
        difficulty: The question's difficulty by the same names.
    """

    steps: tuple[Step, ...]
    answer: int
    seen: Question
    difficulty: Difficulty


def attempt(question: Question, difficulty: Difficulty, rng: np.random.Generator) -> Attempt:
    """Return a solution with mistakes, the convention of its solver included."""
    seen, own = question, difficulty
    if difficulty.other_end and rng.random() < difficulty.other_end:
        seen = replace(question, values=renamed(question.values))
        own = difficulty.renamed()
    steps, answer = solve(seen, Careless(seen, own, rng))
    return Attempt(judged_by(steps, question.values), answer, seen, own)
