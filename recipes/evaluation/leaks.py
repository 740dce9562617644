"""Find questions that two sets share: weights must not be tuned on the test set."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from prm.data.questions import Questions, digest, words_of
from prm.data.store.examples import facts
from prm.schema import StepExample
from recipes.options.values import OptionError


@dataclass(frozen=True)
class Leak:
    """The examples that two sets share.

    Attributes:
        same_file: Whether the sets are the same file.
        ids: The ids in both sets, sorted.
        questions: The questions in both sets, in the order of the first. ``prm.data.questions``
            says which are equal.
    """

    same_file: bool
    ids: tuple[str, ...]
    questions: tuple[str, ...]

    def __bool__(self) -> bool:
        return self.same_file or bool(self.ids or self.questions)

    def __str__(self) -> str:
        if self.same_file:
            return "is the same file"
        if self.ids:
            return f"shares {len(self.ids)} ids, for example {self.ids[0]!r}"
        shown = self.questions[0]
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return f"shares {len(self.questions)} questions, for example {shown!r}"


def find_leak(
    first: Collection[StepExample],
    second: Collection[StepExample],
    first_path: Path,
    second_path: Path,
) -> Leak:
    """Return what two sets of examples share.

    Image files are read only for questions with the same words in both sets. Sets are passed over
    once, and once more if they share words.
    """
    ids = {one.id for one in facts(first)} & {one.id for one in facts(second)}
    questions = Questions()
    texts = _all_words(first) & _all_words(second)
    there = {questions.key(example) for example in _of_words(second, texts)}
    shared = {
        example.question: None
        for example in _of_words(first, texts)
        if questions.key(example) in there
    }
    same = first_path.resolve() == second_path.resolve()
    return Leak(same, tuple(sorted(ids)), tuple(shared))


def refuse_leak(leak: Leak, tuned: str, held_out: str, *, sanity_check: bool) -> None:
    """Refuse to evaluate on questions that something was tuned on, unless that is the purpose.

    Args:
        leak: The examples that the two sets share.
        tuned: The option and the file that something was, or will be, tuned on.
        held_out: The option and the file that measure the result of the tuning.
        sanity_check: Whether the overlap is intended. The caller then labels the results.

    Raises:
        OptionError: The sets overlap, and this is no sanity check.
    """
    if leak and not sanity_check:
        raise OptionError(
            f"{tuned} {leak} with {held_out}: what is tuned on the questions that it is judged by "
            "looks better than it is. Give data of its own, or mark the results as an upper bound "
            "with --sanity-check"
        )


def _all_words(examples: Iterable[StepExample]) -> set[int]:
    """Return a hash of the words of every question."""
    return {digest(words_of(example.question)) for example in examples}


def _of_words(examples: Iterable[StepExample], texts: Collection[int]) -> Iterable[StepExample]:
    """Return the examples whose questions' words have one of these hashes."""
    if not texts:
        return ()
    return (example for example in examples if digest(words_of(example.question)) in texts)
