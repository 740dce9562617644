"""The schema of an example: a question, its images, and the labelled steps of one solution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prm.data_urls import shown


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a solution.

    Attributes:
        text: Text of the step.
        label: Probability in [0, 1] that the step is right: 1.0 for "+", 0.0 for "-", a value in
            between for a soft (Monte Carlo) label; None for a step without a label.
    """

    text: str
    label: float | None = None


@dataclass(frozen=True, slots=True)
class StepExample:
    """One solution of one question.

    Attributes:
        id: Unique within a file; instance weights are stored under it.
        question: Text of the question.
        images: Image files, in the order in which the model sees them; a picture that lies in the
            record itself is a ``data:`` URL (see ``prm.data_urls``).
        steps: The solution, at least one step.
        domain: Name of the domain, for domain weights and reports.
        answer: The answer that the solution ends with, for votes.
        correct: Whether that answer is right; outcome rows (meta, dev, test) have it.
        group: Id that the candidate solutions of one question share.
        extra: Every other key of the record, unchanged.
    """

    id: str
    question: str
    images: tuple[Path, ...]
    steps: tuple[Step, ...]
    domain: str | None = None
    answer: str | None = None
    correct: bool | None = None
    group: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", tuple(Path(image) for image in self.images))
        object.__setattr__(self, "steps", tuple(self.steps))


class DataError(ValueError):
    """An error in a record, or in a file that the record names.

    Attributes:
        expected: What should have been there.
        found: What was there instead.
        file: The file at fault, if there is one.
        line: Line in ``file``, counted from 1.
        field: Path of the field inside the record, such as ``steps[2].label``.
        example: Id of the example, if no file is known.
        remedy: What to change.
    """

    _FIELDS = ("expected", "found", "file", "line", "field", "example", "remedy")

    def __init__(
        self,
        *,
        expected: str,
        found: str,
        file: Path | str | None = None,
        line: int | None = None,
        field: str | None = None,
        example: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.expected = expected
        self.found = found
        self.file = None if file is None else Path(file)
        self.line = line
        self.field = field
        self.example = example
        self.remedy = remedy
        where = "" if self.file is None else shown(self.file)
        where += f":{line}" if where and line is not None else ""
        parts = [
            where,
            "" if example is None else f"example {example!r}",
            "" if field is None else f"field {field}",
            f"expected {expected}, found {_middle_out(found)}" + (f"; {remedy}" if remedy else ""),
        ]
        super().__init__(": ".join(_middle_out(part, 2_000) for part in parts if part))

    def copy(self, **changes: Any) -> DataError:
        """Return the same error with some attributes changed."""
        return DataError(**{name: getattr(self, name) for name in self._FIELDS} | changes)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_error, ({name: getattr(self, name) for name in self._FIELDS},)


def _middle_out(text: str, most: int = 1_000) -> str:
    """Return ``text``, without its middle if it is longer than ``most`` characters."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def _rebuild_error(fields: Mapping[str, Any]) -> DataError:
    return DataError(**fields)
