"""The findings of a check of data files: counts, and the first locations of each kind."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prm.data.bad_rows import BadRows
from prm.data.formats.visualprm import PLACEHOLDER_ID
from prm.data.questions import Questions, digest, words_of
from prm.evaluation.answers import canonical_answer
from prm.schema import DataError, StepExample

_NUMBERED = re.compile(r"<image[ _]?(\d+)>")
_SHOWN = 5
_UNKNOWN = 2
_LINES = 10**10


@dataclass
class Tally:
    """The number of occurrences of one kind of finding, and the first locations."""

    count: int = 0
    first: list[int] = field(default_factory=list)

    def add(self, location: int) -> None:
        """Count one at ``location`` (see ``Findings.location``)."""
        self.count += 1
        if len(self.first) < _SHOWN and location not in self.first:
            self.first.append(location)


@dataclass(frozen=True)
class Mistake:
    """Why a row, or a solution of it, cannot be used."""

    file: str
    line: int | None
    field: str | None
    message: str


class Findings:
    """All findings in the files of one set (train, meta or test).

    Rows are compared by 64-bit hashes. Memory: about 400 bytes a row, independent of its length.

    Args:
        compared: Whether to keep a hash of every question's words for
            ``recipes.data_files.overlap``.
    """

    def __init__(self, *, compared: bool = False) -> None:
        self.files: list[Path] = []
        self.formats: list[str] = []
        self.notes: list[str] = []
        self.rows = 0
        self.examples = 0
        self.steps = 0
        self.errors: dict[Mistake, int] = {}
        self.labels: Counter[str] = Counter({"+": 0, "-": 0, "soft": 0, "none": 0})
        self.outcomes: Counter[str] = Counter({"right": 0, "wrong": 0, "unknown": 0})
        self.one_step = Tally()
        self.one_word_steps = Tally()
        self.duplicates = Tally()
        self.contradictions = Tally()
        self.duplicate_ids = Tally()
        self.image_mismatches = Tally()
        self.mixed_up_groups = Tally()
        self.groups_alike = Tally()
        self.unjudged = Tally()
        self.contradictory_outcomes = Tally()
        self.image_rows = Tally()
        self.images: Counter[str] = Counter()
        self.lengths: list[int] = []
        self.tiles: list[int] = []
        self.bad: list[BadRows] = []
        self.compared = compared
        self.words: set[int] = set()
        self._last = -1
        self._ids: set[int] = set()
        self._names_at: dict[int, int] = {}
        self._rows_with_id = 0
        self._groups: dict[int, int] = {}
        self._group_spelt: dict[int, int] = {}
        self._question_of: dict[int, tuple[int, tuple[Path, ...]]] = {}
        self._questions = Questions()
        self._labels_of: dict[int, bytes] = {}
        self._contents: set[int] = set()
        self._outcome_of: dict[int, bool] = {}

    def start(self, path: Path) -> None:
        """Continue with the next file."""
        self.files.append(path)

    def location(self, line: int) -> int:
        """Return the current file and a line as one number, which saves memory."""
        return location_of(len(self.files) - 1, line)

    def names_shared(self, other: Findings) -> int:
        """Return how many ids occur in both sets."""
        return len(self._names_at.keys() & other._names_at.keys())

    def shown(self, location: int) -> str:
        """Return ``location`` as text."""
        file, line = divmod(location, _LINES)
        return f"{line}" if len(self.files) == 1 else f"{self.files[file].name}:{line}"

    def mistake(self, error: DataError) -> None:
        """Record an error. Solutions of one row that have the same count as one."""
        message = f"expected {error.expected}, found {error.found}"
        message += f"; {error.remedy}" if error.remedy else ""
        mistake = Mistake(str(error.file or self.files[-1]), error.line, error.field, message)
        self.errors[mistake] = self.errors.get(mistake, 0) + 1

    @property
    def bad_rows(self) -> int:
        """Return the number of rows with an error, or of errors without a row."""
        return len({(mistake.file, mistake.line) for mistake in self.errors})

    def row(self, line: int, record: Any) -> None:
        """Count a record, readable or not, and compare its id with those of earlier rows.

        A row of which a candidate cannot be read comes several times and counts once.
        """
        self.rows += self._last != (location := self.location(line))
        self._last = location
        given = record.get("id") if isinstance(record, dict) else None
        if given is None or isinstance(given, list | dict):
            return
        self._rows_with_id += 1
        key = digest((str(given),))
        if key in self._ids:
            self.duplicate_ids.add(self.location(line))
        self._ids.add(key)

    def first_named(self, name: str, location: int) -> int:
        """Return the first location of this id, which is ``location`` if the id is new."""
        return self._names_at.setdefault(digest((name,)), location)

    def example(self, line: int, example: StepExample) -> None:
        """Count an example of the row at ``line`` and compare it with earlier ones."""
        location = self.location(line)
        self.examples += 1
        self.steps += len(example.steps)
        if len(example.steps) == 1:
            self.one_step.add(location)
        for step in example.steps:
            self.labels[_kind(step.label)] += 1
            if len(step.text.split()) == 1:
                self.one_word_steps.add(location)
        outcome = {True: "right", False: "wrong", None: "unknown"}[example.correct]
        self.outcomes[outcome] += 1
        judged = any(step.label is not None for step in example.steps)
        if not judged and example.correct is None:
            self.unjudged.add(location)
        if mismatched(example):
            self.image_mismatches.add(location)
        self._compare(location, example)

    def _compare(self, location: int, example: StepExample) -> None:
        images = [str(image) for image in example.images]
        question = digest((example.question, *images))
        texts = digest((str(question), *(step.text for step in example.steps)))
        labels = [*(step.label for step in example.steps), example.correct]
        content = digest((str(texts), str(labels)))
        if content in self._contents:
            self.duplicates.add(location)
        else:
            self._contents.add(content)
            sides = bytes(_side(label) for label in labels)
            before = self._labels_of.setdefault(texts, sides)
            if any(a != b and _UNKNOWN not in (a, b) for a, b in zip(before, sides, strict=True)):
                self.contradictions.add(location)
        if self.compared or example.group is not None or example.correct is not None:
            self._same_question(location, example)

    def _same_question(self, location: int, example: StepExample) -> None:
        """Compare the example with others of its question and of its group."""
        words = digest(words_of(example.question))
        if self.compared:
            self.words.add(words)
        if example.group is None:
            name = digest((str(words), *map(str, example.images)))
        else:
            name = digest((example.group,))
            if name not in self._question_of:
                folded = digest(words_of(example.group))
                if self._group_spelt.setdefault(folded, name) != name:
                    self.groups_alike.add(location)
            first, images = self._question_of.setdefault(name, (words, example.images))
            contents = self._questions.contents
            if words != first or (
                images != example.images and contents(images) != contents(example.images)
            ):
                self.mixed_up_groups.add(location)
        if example.correct is not None and (answer := canonical_answer(example.answer)):
            key = digest((str(name), str(words), answer))
            if self._outcome_of.setdefault(key, example.correct) != example.correct:
                self.contradictory_outcomes.add(location)
        if example.correct is not None:
            self._groups[name] = self._groups.get(name, 0) | (1 if example.correct else 2)

    def measured(self, location: int, length: int, tiles: int) -> None:
        """Record the numbers of tokens and tiles of an example."""
        self.lengths.append(length)
        self.tiles.append(tiles)

    @property
    def placeholder_ids(self) -> bool:
        """Return whether all rows have the placeholder id that VisualPRM's converter writes."""
        return self._ids == {digest((PLACEHOLDER_ID,))}

    @property
    def constant_id(self) -> bool:
        """Return whether several rows have an id and all of these are equal."""
        return self._rows_with_id > 1 and len(self._ids) == 1

    @property
    def groups(self) -> int:
        """Return the number of questions with outcomes, by ``group`` or question and images."""
        return len(self._groups)

    @property
    def mixed_groups(self) -> int:
        """Return the number of questions with both a right and a wrong solution."""
        return sum(mask == 3 for mask in self._groups.values())

    def figures(self) -> dict[str, Any]:
        """Return the findings for JSON."""
        return {
            "files": [str(path) for path in self.files],
            "formats": self.formats,
            "rows": self.rows,
            "examples": self.examples,
            "steps": self.steps,
            "one_step_rows": self.one_step.count,
            "one_word_steps": self.one_word_steps.count,
            "duplicate_rows": self.duplicates.count,
            "contradictory_rows": self.contradictions.count,
            "duplicate_ids": self.duplicate_ids.count,
            "constant_id": self.constant_id,
            "missing_images": self.images["missing"],
            "unreadable_images": self.images["unreadable"],
            "outside_images": self.images["outside"],
            "rows_with_bad_images": self.image_rows.count,
            "image_count_mismatches": self.image_mismatches.count,
            "label_balance": dict(self.labels),
            "outcome_balance": dict(self.outcomes),
            "contradictory_outcomes": self.contradictory_outcomes.count,
            "unjudged_rows": self.unjudged.count,
            "rows_of_another_question_in_group": self.mixed_up_groups.count,
            "groups_alike": self.groups_alike.count,
            "groups": self.groups,
            "mixed_groups": self.mixed_groups,
            **({"tokens": spread(self.lengths)} if self.lengths else {}),
            **({"tiles": spread(self.tiles)} if self.lengths else {}),
            "errors": [
                {"file": e.file, "line": e.line, "field": e.field, "message": e.message}
                for e in self.errors
            ],
        }


def location_of(file: int, line: int) -> int:
    """Return the number of a file and a line as one number."""
    return file * _LINES + line


def mismatched(example: StepExample) -> bool:
    """Return whether the image marks in the text do not match the number of images.

    The number of ``<image>`` marks, if there are any, must equal that of the images; ``<image 3>``
    needs at least three images.
    """
    texts = [example.question, *(step.text for step in example.steps)]
    if not any("<image" in text for text in texts):
        return False
    plain = sum(text.count("<image>") for text in texts)
    numbers = [int(number[:9]) for text in texts for number in _NUMBERED.findall(text)]
    return plain not in (0, len(example.images)) or max(numbers, default=0) > len(example.images)


def spread(values: list[int]) -> dict[str, float]:
    """Return minimum, median, 95 % quantile, maximum and sum."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "min": ordered[0],
        "median": ordered[last // 2],
        "p95": ordered[round(0.95 * last)],
        "max": ordered[-1],
        "sum": sum(ordered),
    }


def _side(label: float | None) -> int:
    return _UNKNOWN if label is None else int(label >= 0.5)


def _kind(label: float | None) -> str:
    if label is None:
        return "none"
    return {1.0: "+", 0.0: "-"}.get(label, "soft")
