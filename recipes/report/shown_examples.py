"""The examples of highest and lowest weight as a report shows them, with their pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from prm.data_urls import is_embedded
from prm.inputs.tiles import read_image
from prm.schema import DataError, StepExample
from recipes.report.run_files import DataFile
from recipes.report.run_labels import StepLabels
from recipes.report.run_weights import RunWeights

SHOWN = 6
"""Examples shown at either end."""
_MOST_PIXELS = 480  # of the longer side of a picture on the page
_LEAST_PIXELS = 160  # below which a picture is shown larger
_MOST_PICTURES = 4
_MOST_TEXT = 2_000


@dataclass(frozen=True)
class ShownStep:
    """A step: its text, its labels, and its score under the initial and the trained model."""

    text: str
    label: float | None
    learned: float | None
    before: float | None
    after: float | None

    @property
    def mark(self) -> str:
        """The label as the data have it."""
        if self.label is None:
            return "none"
        return {0.0: "-", 1.0: "+"}.get(self.label, f"{self.label:.2f}")

    @property
    def contradicts(self) -> bool:
        """Whether the trained model judges the step otherwise than its label."""
        known = self.label is not None and self.after is not None
        return known and (self.after > 0.5) != (self.label > 0.5)  # type: ignore[operator]


@dataclass(frozen=True)
class ShownExample:
    """One example of an end of the weights.

    Attributes:
        end: "highest" or "lowest".
        id: Its id.
        weight: Its weight.
        facts: Other figures and its origin, by name.
        question: The question.
        steps: The steps of the solution.
        pictures: Its pictures as ``data:`` URLs of PNG.
        without: Why a picture is not shown, for each that is not.
        scored: Whether step scores are known.
        relabelled: Whether labels were learned.
    """

    end: str
    id: str
    weight: float
    facts: Mapping[str, str]
    question: str
    steps: tuple[ShownStep, ...]
    pictures: tuple[str, ...]
    without: tuple[str, ...]
    scored: bool
    relabelled: bool


def shown_examples(
    weights: RunWeights,
    data: DataFile,
    scores: Mapping[str, Mapping[str, Any]],
    labels: Mapping[str, StepLabels],
) -> tuple[ShownExample, ...]:
    """Return the examples of highest weight, then those of lowest.

    Args:
        weights: The weights of the run.
        data: The data file, which is there.
        scores: The lines of ``extreme_weights.jsonl`` by id; an older run has none.
        labels: The given and the learned labels by id, if labels were learned.

    Raises:
        DataError: The data file cannot be read.
    """
    order = weights.order()
    top = min(SHOWN, len(order) // 2)
    ends = [("highest", row) for row in order[:top]] + [
        ("lowest", row) for row in order[::-1][:top]
    ]
    wanted = {weights.ids[row] for _, row in ends}
    examples = {example.id: example for example in data.examples() if example.id in wanted}
    return tuple(
        _shown(end, int(row), weights, examples[name], scores.get(name, {}), labels.get(name))
        for end, row in ends
        if (name := weights.ids[row]) in examples
    )


def _shown(
    end: str,
    row: int,
    weights: RunWeights,
    example: StepExample,
    scores: Mapping[str, Any],
    labels: StepLabels | None,
) -> ShownExample:
    facts = {
        name: f"{weights.columns[column][row]:.4g}"
        for name, column in (("initial loss", "initial_loss"), ("visits", "visits"))
        if column in weights.columns
    }
    origins = (("source", weights.sources), ("domain", weights.domains))
    facts |= {name: str(values[row]) for name, values in origins if values and values[row]}
    before, after = (_scores(scores.get(name)) for name in ("initial_scores", "step_scores"))
    learned = labels[1] if labels is not None else []
    steps = tuple(
        ShownStep(
            _cut(step.text),
            step.label,
            _at(learned, number),
            _at(before, number),
            _at(after, number),
        )
        for number, step in enumerate(example.steps)
    )
    pictures, without = _pictures(example.images)
    return ShownExample(
        end,
        example.id,
        float(weights.weight[row]),
        facts,
        _cut(example.question),
        steps,
        pictures,
        without,
        bool(after),
        labels is not None,
    )


def _scores(value: Any) -> list[float]:
    return [float(score) for score in value] if isinstance(value, list) else []


def _at(values: Sequence[float | None], number: int) -> float | None:
    return values[number] if number < len(values) else None


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]} … ({len(text):,} characters)"


def _pictures(images: Sequence[Path]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return pictures made small as ``data:`` URLs, and the reasons why others are not shown."""
    found, without = [], []
    for image in images[:_MOST_PICTURES]:
        try:
            found.append(_small(image))
        except (OSError, ValueError) as error:
            named = "a picture in the row" if is_embedded(image) else image.name
            reason = error.found if isinstance(error, DataError) else type(error).__name__
            without.append(f"{named}: not shown ({reason})")
    if len(images) > _MOST_PICTURES:
        without.append(f"{len(images) - _MOST_PICTURES} more pictures: not shown")
    return tuple(found), tuple(without)


def _small(image: Path) -> str:
    small = read_image(image).convert("RGB")
    if max(small.size) < _LEAST_PIXELS:
        times = _LEAST_PIXELS // max(small.size) + 1
        larger = (small.width * times, small.height * times)
        small = small.resize(larger, Image.Resampling.NEAREST)
    small.thumbnail((_MOST_PIXELS, _MOST_PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
