"""Selection of one solution among the candidates of a question, with an explicit tie rule.

``best_of_n`` and the votes return whether the selection is right: 1 or 0, or a value in between if
tied candidates disagree and the tie rule is "expected", the average over a fair draw among them.
"first" and "last" use the order of the candidates, from which no selector should gain, so
"expected" is the default. DreamPRM-1.5's ``score >= best`` is "last". ``best_candidate`` returns
the index of the selection by the same rules, with a random draw in place of "expected".
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from random import Random

from prm.names import DrawRule, TieRule


def best_candidate(
    scores: Sequence[float], *, tie: DrawRule = "random", seed: int | str = 0
) -> tuple[int, tuple[int, ...]]:
    """Return argmax S_i, and all indices that share the maximum.

    Args:
        scores: The solution score of each candidate.
        tie: The rule that selects among candidates with the same, highest score.
        seed: The seed of the draw. If it contains the question's name, the draw does not depend on
            the other questions.

    Returns:
        The selected index, and all tied indices in order.

    Raises:
        ValueError: There are no candidates, a score is not a number, or the tie rule is unknown.
    """
    if not len(scores):
        raise ValueError("expected at least one candidate, found none")
    _check_numbers(scores)
    best = max(scores)
    tied = tuple(index for index, score in enumerate(scores) if score == best)
    if tie == "first":
        return tied[0], tied
    if tie == "last":
        return tied[-1], tied
    if tie == "random":
        return Random(seed).choice(tied), tied
    raise ValueError(f"expected tie rule 'random', 'first' or 'last', found {tie!r}")


def best_of_n(
    scores: Sequence[float], correct: Sequence[float], *, tie: TieRule = "expected"
) -> float:
    """Return c_i at i = argmax S_i.

    Args:
        scores: The solution score S_i of each candidate.
        correct: Whether each candidate's answer is right, c_i.
        tie: The rule that selects among candidates with the same, highest score.

    Raises:
        ValueError: There are no candidates, the lengths differ, or a score is not a number.
    """
    _check(correct, scores=scores)
    _check_numbers(scores)
    best = max(scores)
    return _settle([c for s, c in zip(scores, correct, strict=True) if s == best], tie)


def self_consistency(
    answers: Sequence[Hashable | None], correct: Sequence[float], *, tie: TieRule = "expected"
) -> float:
    """Return whether the majority vote, argmax_a Σ_i 1[a_i = a], is right.

    Args:
        answers: The answer a_i of each candidate. None means that it has no answer and no vote.
        correct: Whether each candidate's answer is right.
        tie: The rule that selects among answers with the most votes: a fair draw, the answer that
            was given first, or the answer whose first vote came last.

    Returns:
        The mean of ``correct`` over the votes for the answer, or 0.0 if no candidate has one.

    Raises:
        ValueError: There are no candidates, or the lengths differ.
    """
    return weighted_vote(answers, [1.0] * len(answers), correct, tie=tie)


def weighted_vote(
    answers: Sequence[Hashable | None],
    scores: Sequence[float],
    correct: Sequence[float],
    *,
    tie: TieRule = "expected",
) -> float:
    """Return whether the vote weighted by scores, argmax_a Σ_i 1[a_i = a] S_i, is right.

    Arguments, result and errors are those of ``self_consistency`` and ``best_of_n``. Candidates
    with the same answer that differ in ``correct`` count with their mean.
    """
    _check(correct, answers=answers, scores=scores)
    _check_numbers(scores)
    votes: dict[Hashable, list[tuple[float, float]]] = {}
    for answer, score, right in zip(answers, scores, correct, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append((score, right))
    if not votes:
        return 0.0
    # fsum rounds exactly, so ties do not depend on the order of the votes.
    totals = {answer: math.fsum(score for score, _ in given) for answer, given in votes.items()}
    most = max(totals.values())
    winners = [votes[answer] for answer in votes if totals[answer] == most]
    return _settle([math.fsum(right for _, right in given) / len(given) for given in winners], tie)


def _settle(tied: Sequence[float], tie: str) -> float:
    if tie == "first":
        return float(tied[0])
    if tie == "last":
        return float(tied[-1])
    if tie == "expected":
        return math.fsum(tied) / len(tied)
    raise ValueError(f"expected tie rule 'expected', 'first' or 'last', found {tie!r}")


def _check(correct: Sequence[float], **others: Sequence[object]) -> None:
    if not len(correct):
        raise ValueError("expected at least one candidate, found none")
    for name, values in others.items():
        if len(values) != len(correct):
            raise ValueError(
                f"expected one entry per candidate, found {len(values)} {name} and "
                f"{len(correct)} correct"
            )


def _check_numbers(scores: Sequence[float]) -> None:
    for index, score in enumerate(scores):
        if math.isnan(score):
            raise ValueError(f"expected a number as score of candidate {index}, found NaN")
