"""Label sources: who judged the steps of a training solution, and how well.

A right judgement follows the convention of process reward models: a step is "+" while everything
up to and including it is true, and "-" from the first false step on. The sources differ from it as
sources of real data do:

- ``verified``: right judgements, as from careful annotators.
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

from recipes.embedded.questions import Step

SOURCES = ("verified", "rollout", "crowd", "imported")
TRANSPOSED = {"A1": "A1", "A2": "B1", "B1": "A2", "B2": "B2"}


@dataclass(frozen=True)
class Mixture:
    """Shares of the sources in the training set, and how bad the bad ones are."""

    verified: float = 0.45
    rollout: float = 0.25
    crowd: float = 0.15
    imported: float = 0.15
    recovery: float = 0.9  # chance that completions recover from a wrong step
    failure: float = 0.15  # chance that all completions of a right step fail
    flip: float = 0.4  # chance that a crowd judgement is flipped

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
    """Right judgements: true while every step so far is true."""
    return [all(step.true for step in steps[: index + 1]) for index in range(len(steps))]


def judge(
    source: str,
    steps: Sequence[Step],
    answer_is_right: bool,
    mixture: Mixture,
    rng: np.random.Generator,
) -> list[bool]:
    """The labels that ``source`` gives to the steps of one solution."""
    labels = true_labels(steps)
    if source == "rollout":
        return _rollout(labels, answer_is_right, mixture, rng)
    if source == "crowd":
        return [label ^ bool(rng.random() < mixture.flip) for label in labels]
    return labels


def _rollout(
    labels: list[bool], answer_is_right: bool, mixture: Mixture, rng: np.random.Generator
) -> list[bool]:
    # Whether completions recover is decided once per solution: the same policy continues each
    # prefix, so its successes go together.
    recovers = answer_is_right or rng.random() < mixture.recovery
    if all(labels):
        return [bool(rng.random() >= mixture.failure) for _ in labels]
    return [label or recovers for label in labels]
