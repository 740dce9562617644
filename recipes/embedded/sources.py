"""Label sources: who judged the steps of a training solution, and how well.

A right judgement says whether the step itself is true of the picture and of arithmetic, taking
the numbers of earlier steps as given (as VisualProcessBench judges every step, also after a
mistake). The sources differ from it as sources of real data do:

- ``verified``: right judgements, as from careful annotators.
- ``judge``: a weaker vision-language model as judge. It misreads the same hard cells as the solver,
  and as the same digits, so that it confirms the solver's misreadings and rejects right readings;
  and it does not check calculations, but waves them through.
- ``rollout``: Monte-Carlo judgements. A wrong step passes as "+" whenever sampled completions
  recover from it, which they mostly do when the mistake is one that is easily corrected later, and
  always when the answer came out right anyway: systematic false positives. Now and then a right
  step is judged "-" because all completions failed.
- ``crowd``: hurried annotators; a share of judgements is flipped at random.
- ``imported``: another corpus whose cells are named column first (its A2 is our B1) and whose
  sheets show dots instead of digits: its labels are right by its own convention, wrong by ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recipes.embedded.questions import Question, Step, answer, stated_answer
from recipes.embedded.student import Difficulty

SOURCES = ("verified", "judge", "rollout", "crowd", "imported")
_HARD = 0.3  # the judge misreads the cells that a solver misreads more often than this
TRANSPOSED = {"A1": "A1", "A2": "B1", "B1": "A2", "B2": "B2"}


@dataclass(frozen=True)
class Mixture:
    """Shares of the sources in the training set, and how bad the bad ones are."""

    verified: float = 0.42
    judge: float = 0.23
    rollout: float = 0.16
    crowd: float = 0.10
    imported: float = 0.09
    recovery: float = 0.95  # chance that completions recover from a wrong step
    failure: float = 0.3  # chance that all completions of a right step fail
    flip: float = 0.4  # chance that a crowd judgement is flipped
    blindness: float = 0.35  # chance that the judge misreads a cell that is not hard
    lenience: float = 0.95  # chance that the judge waves a wrong calculation through

    def shares(self) -> np.ndarray:
        """Shares in the order of ``SOURCES``; they must sum to 1."""
        shares = np.array([getattr(self, source) for source in SOURCES])
        if (shares < 0).any() or not np.isclose(shares.sum(), 1.0):
            raise ValueError(
                f"the shares of {', '.join(SOURCES)} must be non-negative and sum to 1; "
                f"found {shares.tolist()}"
            )
        return shares


def true_labels(steps: Sequence[Step]) -> list[bool]:
    """Right judgements: whether each step is true."""
    return [step.true for step in steps]


def judge(
    source: str,
    question: Question,
    steps: Sequence[Step],
    difficulty: Difficulty,
    mixture: Mixture,
    rng: np.random.Generator,
) -> list[bool]:
    """The labels that ``source`` gives to the steps of one solution.

    Args:
        source: One of ``SOURCES``.
        question: What was asked, with the right values.
        steps: The solution.
        difficulty: What is hard about the question, for solver and judge alike.
        mixture: How bad the sources are.
        rng: Randomness of the judgements.
    """
    labels = true_labels(steps)
    if source == "judge":
        return _judge(question, steps, difficulty, mixture, rng)
    if source == "rollout":
        return _rollout(labels, question, steps, mixture, rng)
    if source == "crowd":
        return [label ^ bool(rng.random() < mixture.flip) for label in labels]
    return labels


def _judge(
    question: Question,
    steps: Sequence[Step],
    difficulty: Difficulty,
    mixture: Mixture,
    rng: np.random.Generator,
) -> list[bool]:
    seen = {
        cell: difficulty.taken_for[cell]
        if difficulty.misread[cell] > _HARD or rng.random() < mixture.blindness
        else value
        for cell, value in question.values.items()
    }
    return [
        (step.true or bool(rng.random() < mixture.lenience))
        if step.reading is None
        else seen[step.reading[0]] == step.reading[1]
        for step in steps
    ]


def _rollout(
    labels: list[bool],
    question: Question,
    steps: Sequence[Step],
    mixture: Mixture,
    rng: np.random.Generator,
) -> list[bool]:
    # Whether completions recover is decided once per solution: the same policy continues each
    # prefix, so its successes go together.
    recovers = stated_answer(steps) == answer(question) or rng.random() < mixture.recovery
    if all(labels):
        return [bool(rng.random() >= mixture.failure) for _ in labels]
    return [label or recovers for label in labels]
