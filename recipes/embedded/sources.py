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
- ``guideline``: careful annotators who follow another guideline: they count rows from the top, and
  the right answers count them from the bottom. Their labels are right by their own convention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recipes.embedded.questions import Question, Step, answer, judged_by
from recipes.embedded.sheets import renamed
from recipes.embedded.student import Attempt

SOURCES = ("verified", "judge", "rollout", "crowd", "guideline")
_HARD = 0.3  # The judge misreads cells that the solver misreads with more than this chance.


@dataclass(frozen=True)
class Mixture:
    """The shares of the sources in the training set, and the error rates of the bad ones."""

    verified: float = 0.30
    judge: float = 0.10
    rollout: float = 0.08
    crowd: float = 0.08
    guideline: float = 0.44
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
    attempt: Attempt,
    mixture: Mixture,
    rng: np.random.Generator,
) -> list[bool]:
    """Return the labels that ``source`` gives to the steps of one solution.

    Args:
        source: One of ``SOURCES``.
        question: The question, with the right values.
        attempt: The solution.
        mixture: The error rates of the sources.
        rng: The generator of the labels' random errors.
    """
    labels = true_labels(attempt.steps)
    if source == "guideline":
        return true_labels(judged_by(attempt.steps, renamed(question.values)))
    if source == "judge":
        return _judge(attempt, mixture, rng)
    if source == "rollout":
        return _rollout(labels, attempt.answer == answer(question), mixture, rng)
    if source == "crowd":
        return [label ^ bool(rng.random() < mixture.flip) for label in labels]
    return labels


def _judge(attempt: Attempt, mixture: Mixture, rng: np.random.Generator) -> list[bool]:
    difficulty = attempt.difficulty
    seen = {
        cell: difficulty.taken_for[cell]
        if difficulty.misread[cell] > _HARD or rng.random() < mixture.blindness
        else value
        for cell, value in attempt.seen.values.items()
    }
    return [
        (step.true or bool(rng.random() < mixture.lenience))
        if step.reading is None
        else seen[step.reading[0]] == step.reading[1]
        for step in attempt.steps
    ]


def _rollout(
    labels: list[bool], is_right: bool, mixture: Mixture, rng: np.random.Generator
) -> list[bool]:
    # Whether completions recover is decided once per solution: the same policy continues each
    # prefix, so its successes go together.
    recovers = is_right or rng.random() < mixture.recovery
    if all(labels):
        return [bool(rng.random() >= mixture.failure) for _ in labels]
    return [label or recovers for label in labels]
