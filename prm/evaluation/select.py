"""Selection of one solution among the candidates of a question, with a declared tie rule.

``best_of_n`` and the votes return how right the selection is: 1 or 0, or in between where tied
candidates disagree and the tie rule is "expected" (the value on average over a fair draw among
them). "first" and "last" go by the order of the candidates; a strong selector must not gain from
either, so "expected" is the default. DreamPRM-1.5's ``score >= best`` is "last".
``best_candidate`` returns which one, by the same rules, "expected" turned into a draw.
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
        scores: Solution score of each candidate.
        tie: Which of several candidates with the same, highest score is taken.
        seed: Decides the draw; with the question's name in it, the draw of a question does not
            depend on which other questions there are.

    Returns:
        The index that is taken, and all tied indices in order.

    Raises:
        ValueError: No candidates, a score that is not a number, or an unknown tie rule.
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
    """c_i at i = argmax S_i.

    Args:
        scores: Solution score of each candidate.
        correct: Whether each candidate's answer is right.
        tie: Which of several candidates with the same, highest score is taken.

    Raises:
        ValueError: No candidates, different lengths, or a score that is not a number.
    """
    _check(correct, scores=scores)
    _check_numbers(scores)
    best = max(scores)
    return _settle([c for s, c in zip(scores, correct, strict=True) if s == best], tie)


def self_consistency(
    answers: Sequence[Hashable | None], correct: Sequence[float], *, tie: TieRule = "expected"
) -> float:
    """Majority vote: argmax_a Σ_i 1[a_i = a].

    Args:
        answers: What each candidate answers; None (no answer found) does not vote.
        correct: Whether each candidate's answer is right.
        tie: Which of several answers with the most votes is taken: a fair draw, or the one that
            was given first, or the one whose first vote came last.

    Returns:
        0.0 if no candidate has an answer.

    Raises:
        ValueError: No candidates, or different lengths.
    """
    return weighted_vote(answers, [1.0] * len(answers), correct, tie=tie)


def weighted_vote(
    answers: Sequence[Hashable | None],
    scores: Sequence[float],
    correct: Sequence[float],
    *,
    tie: TieRule = "expected",
) -> float:
    """Vote weighted by solution scores: argmax_a Σ_i 1[a_i = a] S_i.

    Arguments, result and errors as in ``self_consistency`` and ``best_of_n``. Candidates that give
    the same answer and yet differ in ``correct`` count with their mean.
    """
    _check(correct, answers=answers, scores=scores)
    _check_numbers(scores)
    votes: dict[Hashable, list[tuple[float, float]]] = {}
    for answer, score, right in zip(answers, scores, correct, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append((score, right))
    if not votes:
        return 0.0
    # Exactly rounded sums: a tie does not depend on the order in which votes come in.
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
