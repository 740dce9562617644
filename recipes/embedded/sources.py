"""Label sources: annotators of different quality for the steps of training solutions.

A right label states whether the step itself is true of the picture and of arithmetic, given the
numbers of earlier steps. VisualProcessBench judges every step in this way, also after a mistake.
The sources deviate from it as sources of real data do:

- ``verified``: right labels, as from careful annotators.
- ``judge``: labels of a weaker vision-language model. It misreads the same hard cells as the
  solver, and as the same digits, so it confirms the solver's misreadings and rejects right
  readings. It accepts calculations without a check.
- ``rollout``: Monte Carlo labels. A wrong step is labelled "+" if sampled completions recover from
  it: always if the answer is right anyway, and mostly if the mistake is easy to correct later.
  These are systematic false positives. A right step is sometimes labelled "-" because all
  completions failed.
- ``crowd``: hurried annotators, a share of whose labels is flipped at random.
- ``imported``: another corpus, whose cells are named column first (its A2 is our B1) and whose
  sheets show dots instead of digits. Its labels are right by its own convention and wrong by ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recipes.embedded.questions import Question, Step, answer, stated_answer
from recipes.embedded.student import Difficulty

SOURCES = ("verified", "judge", "rollout", "crowd", "imported")
_HARD = 0.3  # The judge misreads cells that the solver misreads with more than this chance.
TRANSPOSED = {"A1": "A1", "A2": "B1", "B1": "A2", "B2": "B2"}


@dataclass(frozen=True)
class Mixture:
    """The shares of the sources in the training set, and the error rates of the bad ones."""

    verified: float = 0.42
    judge: float = 0.23
    rollout: float = 0.16
    crowd: float = 0.10
    imported: float = 0.09
    recovery: float = 0.95  # chance that completions recover from a wrong step
    failure: float = 0.3  # chance that all completions of a right step fail
    flip: float = 0.4  # chance that a crowd judgement is flipped
    blindness: float = 0.35  # chance that the judge misreads a cell that is not hard
    lenience: float = 0.95  # chance that the judge accepts a wrong calculation

    def shares(self) -> np.ndarray:
        """Return the shares in the order of ``SOURCES``; they must sum to 1."""
        shares = np.array([getattr(self, source) for source in SOURCES])
        if (shares < 0).any() or not np.isclose(shares.sum(), 1.0):
            raise ValueError(
                f"the shares of {', '.join(SOURCES)} must be non-negative and sum to 1; "
                f"found {shares.tolist()}"
            )
        return shares


def true_labels(steps: Sequence[Step]) -> list[bool]:
    """Return the right labels: whether each step is true."""
    return [step.true for step in steps]


def judge(
    source: str,
    question: Question,
    steps: Sequence[Step],
    difficulty: Difficulty,
    mixture: Mixture,
    rng: np.random.Generator,
) -> list[bool]:
    """Return the labels that ``source`` gives to the steps of one solution.

    Args:
        source: One of ``SOURCES``.
        question: The question, with the right values.
        steps: The solution.
        difficulty: The difficulty of the question, which solver and judge share.
        mixture: The error rates of the sources.
        rng: The generator of the labels' random errors.
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
