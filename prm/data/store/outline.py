"""What is asked of every example of a file, in columns of small numbers."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, MutableSequence, Sequence
from pathlib import Path
from typing import NamedTuple

from prm.data.interned import Interned
from prm.data.json_rows import Span
from prm.data.store.sources import Place
from prm.data_urls import is_embedded
from prm.schema import StepExample

_NONE = -1
_OUTCOMES = {None: _NONE, False: 0, True: 1}
_OUTCOME_OF = {number: outcome for outcome, number in _OUTCOMES.items()}


class Facts(NamedTuple):
    """What is known of an example without reading its texts and pictures.

    Attributes:
        id: Its id.
        domain: Its domain, None without one.
        group: Its group, None without one.
        answer: Its final answer, None without one.
        correct: Whether that is right, None if it is not known.
        labels: The label of every step, None without one.
    """

    id: str
    domain: str | None
    group: str | None
    answer: str | None
    correct: bool | None
    labels: tuple[float | None, ...]

    @property
    def labelled(self) -> bool:
        """Whether a step has a label."""
        return any(label is not None for label in self.labels)


def facts_of(example: StepExample) -> Facts:
    """Return the facts of an example."""
    return Facts(
        example.id,
        example.domain,
        example.group,
        example.answer,
        example.correct,
        tuple(step.label for step in example.steps),
    )


class Outline:
    """The facts of every example of a file, where its record lies, and which pictures it has.

    An example takes 57 bytes, 8 more per step and 4 per picture, and the bytes of its id. Texts
    that repeat (domains, groups, answers, paths) are held once.
    """

    def __init__(self, ids: Interned) -> None:
        """Begin an outline without examples; ``ids`` holds the ids of those that are added."""
        self.ids = ids
        self.pictures = Interned()
        self._starts, self._sizes, self._checksums = array("q"), array("I"), array("I")
        self._lines, self._candidates = array("I"), array("I")
        self._names, self._correct = array("i"), array("b")
        self._texts = {name: Interned() for name in ("domain", "group", "answer")}
        self._numbers = {name: array("i") for name in self._texts}
        self._labels, self._label_ends = array("d"), array("q", [0])
        self._shown, self._shown_ends = array("i"), array("q", [0])

    def __len__(self) -> int:
        return len(self._names)

    def add(self, example: StepExample, place: Place, candidate: int) -> None:
        """Add an example.

        Args:
            example: The example, whose id is among ``ids``.
            place: Where its record lies.
            candidate: Its number among the examples of the record.
        """
        line, (start, size, checksum) = place
        self._starts.append(start)
        self._sizes.append(size)
        self._checksums.append(checksum)
        self._lines.append(line)
        self._candidates.append(candidate)
        self._names.append(self.ids[example.id])
        self._correct.append(_OUTCOMES[example.correct])
        for name, texts in self._texts.items():
            text = getattr(example, name)
            self._numbers[name].append(_NONE if text is None else texts.add(text))
        labels = (step.label for step in example.steps)
        self._labels.extend(math.nan if label is None else label for label in labels)
        self._label_ends.append(len(self._labels))
        for image in example.images:
            if not is_embedded(image):
                self._shown.append(self.pictures.add(str(image)))
        self._shown_ends.append(len(self._shown))

    def place(self, row: int) -> tuple[Place, int]:
        """Return where the record of an example lies, and the example's number in it."""
        span = Span(self._starts[row], self._sizes[row], self._checksums[row])
        return Place(self._lines[row], span), self._candidates[row]

    def line(self, row: int) -> int:
        """Return the line of an example."""
        return self._lines[row]

    def id(self, row: int) -> str:
        """Return the id of an example."""
        return self.ids.text(self._names[row])

    def facts(self, row: int) -> Facts:
        """Return the facts of an example."""
        labels = self._labels[self._label_ends[row] : self._label_ends[row + 1]]
        return Facts(
            self.id(row),
            self._text("domain", row),
            self._text("group", row),
            self._text("answer", row),
            _OUTCOME_OF[self._correct[row]],
            tuple(None if label != label else label for label in labels),
        )

    def images(self, row: int) -> Iterator[Path]:
        """Yield the picture files of an example; pictures in the record itself are left out."""
        numbers = self._shown[self._shown_ends[row] : self._shown_ends[row + 1]]
        return (Path(self.pictures.text(number)) for number in numbers)

    def numbered(self, rows: Sequence[int]) -> MutableSequence[int]:
        """Return the position in ``rows`` of every number of ``ids``, -1 for those that are not.

        Raises:
            ValueError: Two of the rows have one id.
        """
        positions = array("i", [_NONE]) * len(self.ids)
        for position, row in enumerate(rows):
            number = self._names[row]
            if positions[number] != _NONE:
                raise ValueError(
                    f"id {self.ids.text(number)!r} occurs in rows {positions[number]} and "
                    f"{position}; ids must be unique"
                )
            positions[number] = position
        return positions

    def _text(self, name: str, row: int) -> str | None:
        number = self._numbers[name][row]
        return None if number == _NONE else self._texts[name].text(number)
