"""Where the step labels of the Game of 24 come from: three annotators of one solution.

- ``verified``: the exact search. A step is right while 24 can still be reached.
- ``credulous``: a systematic error. The annotator believes what a solution states. A move is right
  if 24 can be made of the numbers that it lists as left, whether or not they are what is left, and
  an answer is right if it says that it is 24. So a solution that cheats on the way to 24 gets "+"
  to its end, and everything else the right labels.
- ``rollout``: Monte-Carlo estimation from the candidates themselves. A step is right if one of the
  puzzle's candidates that begin with the same steps has the right answer (the hard estimate of
  Math-Shepherd, arXiv 2312.08935). Few candidates share a beginning, so that many steps from which
  24 can be reached get "-".
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from fractions import Fraction
from random import Random

from prm.schema import StepExample
from recipes.evidence.smollm2.label import reaches

SOURCES = ("verified", "credulous", "rollout")
_LEFT = re.compile(r"\(left: ([^()]*)\)")
_IS_24 = re.compile(r"= *24\W*$")


@dataclass(frozen=True)
class Mixture:
    """The shares of the sources among the labelled solutions."""

    verified: float = 0.30
    credulous: float = 0.55
    rollout: float = 0.15

    def of(self, count: int, rng: Random) -> list[str]:
        """Return ``count`` sources in random order, as many of each as its share says.

        Raises:
            ValueError: A share is negative, or they do not sum to 1.
        """
        shares = [getattr(self, source) for source in SOURCES]
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
            raise ValueError(
                f"expected shares of {', '.join(SOURCES)} that are not negative and sum to 1, "
                f"found {shares}"
            )
        ends = [round(count * sum(shares[: number + 1])) for number in range(len(shares))]
        starts = [0, *ends[:-1]]
        drawn = [
            source
            for source, start, end in zip(SOURCES, starts, ends, strict=True)
            for _ in range(end - start)
        ]
        rng.shuffle(drawn)
        return drawn


def beginnings(solutions: Sequence[StepExample]) -> set[tuple[str, ...]]:
    """Return the beginnings, as texts of steps, of the solutions whose answer is right."""
    right = [[step.text for step in solution.steps] for solution in solutions if solution.correct]
    return {tuple(texts[: end + 1]) for texts in right for end in range(len(texts))}


def judged(example: StepExample, source: str, right: Set[tuple[str, ...]]) -> StepExample:
    """Return the example with the labels of ``source``, and how many of them are wrong.

    Args:
        example: A solution with exact step labels.
        source: One of ``SOURCES``.
        right: The beginnings of the puzzle's right candidates.

    Returns:
        The example, whose ``extra`` holds ``source`` and ``wrong_labels``.
    """
    truth = [step.label == 1 for step in example.steps]
    labels = {"verified": truth, "credulous": _believed(example), "rollout": _met(example, right)}
    steps = (
        replace(step, label=float(label))
        for step, label in zip(example.steps, labels[source], strict=True)
    )
    wrong = sum(a != b for a, b in zip(labels[source], truth, strict=True))
    return replace(example, steps=tuple(steps), extra={"source": source, "wrong_labels": wrong})


def _believed(example: StepExample) -> list[bool]:
    return [
        bool(_IS_24.search(step.text)) if step.text.startswith("Answer") else _promises(step.text)
        for step in example.steps
    ]


def _promises(move: str) -> bool:
    """Return whether 24 can be made of the numbers that the move lists as left."""
    listed = _LEFT.search(move)
    try:
        numbers = tuple(sorted(Fraction(word) for word in listed[1].split())) if listed else ()
    except (ValueError, ZeroDivisionError):
        return False
    return bool(numbers) and reaches(numbers)


def _met(example: StepExample, right: Set[tuple[str, ...]]) -> list[bool]:
    texts = tuple(step.text for step in example.steps)
    return [texts[: end + 1] in right for end in range(len(texts))]
