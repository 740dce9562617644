"""Find questions that two sets share: weights must not be tuned on the test set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prm.data.questions import Questions, words_of
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
    first: Sequence[StepExample], second: Sequence[StepExample], first_path: Path, second_path: Path
) -> Leak:
    """Return what two sets of examples share.

    Image files are read only for questions with the same words in both sets.
    """
    ids = {example.id for example in first} & {example.id for example in second}
    questions = Questions()
    words = [{_words(example) for example in examples} for examples in (first, second)]
    texts = words[0] & words[1]
    there = {questions.key(example) for example in second if _words(example) in texts}
    shared = {
        example.question: None
        for example in first
        if _words(example) in texts and questions.key(example) in there
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


def _words(example: StepExample) -> tuple[str, ...]:
    return tuple(words_of(example.question))
