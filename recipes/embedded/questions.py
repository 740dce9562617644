"""Questions about a sheet, and their solutions.

There are three families, one domain each. All solutions have five steps, so that their length
carries no information about the answer, which is the number in the last step:

- ``sum``: add three cells;
- ``gap``: the distance between the sum of two cells and a third;
- ``largest``: the largest of three cells.

``solve`` writes a solution by means of primitive operations, which a careless solver replaces by
its own (``student``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from recipes.embedded.sheets import CELLS

FAMILIES = ("sum", "gap", "largest")


@dataclass(frozen=True)
class Question:
    """Three cells of a sheet and the operation on their values."""

    family: str
    cells: tuple[str, str, str]
    values: Mapping[str, int]

    @property
    def text(self) -> str:
        """Return the question's text."""
        a, b, c = self.cells
        return {
            "sum": f"what is {a} plus {b} plus {c} ?",
            "gap": f"what is the gap between {a} plus {b} and {c} ?",
            "largest": f"what is the largest of {a} {b} {c} ?",
        }[self.family]


class Operations(Protocol):
    """A solver's reading and arithmetic; each method returns the value that the solver *states*."""

    def read(self, cell: str) -> int:
        """Return the value stated for a cell."""

    def combine(self, operation: str, left: int, right: int) -> int:
        """Return the value stated for ``left operation right``."""


@dataclass(frozen=True)
class Step:
    """One step of a solution: its text and whether it is true of the sheet and of arithmetic.

    ``reading`` is the (cell, stated value) of a step that reads a cell, None for other steps.
    """

    text: str
    true: bool
    reading: tuple[str, int] | None = None


def apply(operation: str, left: int, right: int) -> int:
    """Return the right value of ``left operation right``."""
    return {"plus": left + right, "gap": abs(left - right), "max": max(left, right)}[operation]


def read_step(cell: str, value: int, values: Mapping[str, int]) -> Step:
    """Return the statement that ``cell`` shows ``value``."""
    return Step(f"{cell}= {value}", values[cell] == value, (cell, value))


def combine_step(operation: str, left: int, right: int, value: int) -> Step:
    """Return the statement that ``left operation right`` equals ``value``."""
    return Step(f"{left} {operation} {right} = {value}", apply(operation, left, right) == value)


def solve(question: Question, operations: Operations) -> tuple[tuple[Step, ...], int]:
    """Return the steps that a solver writes for ``question``, and its answer."""
    first, second = {"sum": ("plus", "plus"), "gap": ("plus", "gap"), "largest": ("max", "max")}[
        question.family
    ]
    a, b, c = question.cells
    x, y = operations.read(a), operations.read(b)
    left = operations.combine(first, x, y)
    z = operations.read(c)
    right = operations.combine(second, left, z)
    steps = (
        read_step(a, x, question.values),
        read_step(b, y, question.values),
        combine_step(first, x, y, left),
        read_step(c, z, question.values),
        combine_step(second, left, z, right),
    )
    return steps, right


@dataclass(frozen=True)
class Exact:
    """Operations that make no mistake."""

    values: Mapping[str, int]

    def read(self, cell: str) -> int:
        """Return the value that the sheet shows."""
        return self.values[cell]

    def combine(self, operation: str, left: int, right: int) -> int:
        """Return the right value."""
        return apply(operation, left, right)


def stated_answer(steps: Sequence[Step]) -> int:
    """Return the number in the last step."""
    return int(steps[-1].text.split()[-1])


def judged_by(steps: Sequence[Step], values: Mapping[str, int]) -> tuple[Step, ...]:
    """Return the same steps with their readings compared with ``values``."""
    return tuple(
        step if step.reading is None else read_step(*step.reading, values) for step in steps
    )


def answer(question: Question) -> int:
    """Return the right answer."""
    return solve(question, Exact(question.values))[1]


def draw_question(
    rng: np.random.Generator,
    family: str | None = None,
    values: Mapping[str, int] | None = None,
) -> Question:
    """Draw a question with distinct cells and, unless given, values uniform in 0..9."""
    shown = values if values is not None else {cell: int(rng.integers(10)) for cell in CELLS}
    first, second, third = (CELLS[i] for i in rng.permutation(len(CELLS))[:3])
    chosen = family if family is not None else FAMILIES[int(rng.integers(len(FAMILIES)))]
    return Question(chosen, (first, second, third), shown)
