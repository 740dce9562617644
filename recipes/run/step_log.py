"""The lines of ``log.jsonl``: means, notes and troubles of the steps since the last line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bilevel import StepInfo
from recipes.run.errors import WriteError
from recipes.run.trouble import Trouble, added, beside_upper_loss
from weighting import effective_sample_size

_NOTES_PER_LINE = 5


@dataclass(frozen=True)
class Unlogged:
    """Figures, notes and troubles since the last line, in a form that JSON can hold.

    Attributes:
        figures: The values of the steps in order, by name. A line holds their means.
        notes: The first five different notes of the solver.
        troubles: The number of troubles of each kind (``recipes.run.trouble``).
        skipped: The numbers of the steps that were rejected or rolled back.
    """

    figures: Mapping[str, Sequence[float]]
    notes: Sequence[str] = field(default_factory=list)
    troubles: Mapping[str, int] = field(default_factory=dict)
    skipped: Sequence[int] = field(default_factory=list)

    def after(self, info: StepInfo) -> Unlogged:
        """Return a copy with one more accepted step."""
        figures = {name: list(values) for name, values in self.figures.items()}
        for name, value in figures_of(info).items():
            figures.setdefault(name, []).append(value)
        notes = list(dict.fromkeys([*self.notes, *info.notes]))[:_NOTES_PER_LINE]
        return Unlogged(figures, notes, self.troubles, self.skipped)

    def with_troubles(self, new: Sequence[Trouble], skipped: Sequence[int]) -> Unlogged:
        """Return a copy with more troubles and the numbers (from 1) of their rejected steps."""
        counts = added(self.troubles, new)
        return Unlogged(self.figures, self.notes, counts, [*self.skipped, *skipped])

    def means(self) -> dict[str, float]:
        """Return the mean of every figure over the steps that have it."""
        return {name: sum(values) / len(values) for name, values in self.figures.items()}

    def line(self, title: str, step: int, upper_skipped: int, rates: Mapping[str, float]) -> str:
        """Return the line of the log after ``step`` steps; a non-finite figure is null."""
        entry: dict[str, Any] = {"phase": title, "step": step, **self.means(), **rates}
        entry = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in entry.items()
        }
        if upper_skipped:
            entry["upper_skipped"] = upper_skipped
        for name, what in (
            ("troubles", self.troubles),
            ("skipped_steps", self.skipped),
            ("notes", self.notes),
        ):
            if what:
                entry[name] = what
        return json_line(entry)


def json_line(entry: Mapping[str, Any]) -> str:
    """Return a line of the log, without its line break."""
    return json.dumps(entry, ensure_ascii=False)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file.

    Raises:
        WriteError: The line cannot be written. An incomplete line is dropped on resuming.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror})") from error


def figures_of(info: StepInfo) -> dict[str, float]:
    """Return the scalars of a step, by their names in the log."""
    figures = {
        "lower_loss": float(info.lower_loss),
        "lower_grad_norm": float(info.lower_grad_norm),
    }
    if info.weights is not None:
        figures |= _weight_figures(info.weights)
    if info.upper_loss is not None:
        figures["upper_loss"] = float(info.upper_loss)
    if info.hypergradient_norm is not None:
        figures["hypergradient_norm"] = float(info.hypergradient_norm)
    figures |= {name: float(value) for name, value in beside_upper_loss(info).items()}
    return figures | {f"hypergradient/{name}": float(v) for name, v in info.figures.items()}


def _weight_figures(weights: Tensor) -> dict[str, float]:
    return {
        "weights/mean": float(weights.mean()),
        "weights/min": float(weights.min()),
        "weights/max": float(weights.max()),
        "weights/ess": effective_sample_size(weights) / max(1, weights.numel()),
    }
