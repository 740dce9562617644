"""What was to be reached, beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from recipes.evidence.gpu import case as names
from recipes.evidence.gpu.agreement import cosine, sign_agreement
from recipes.evidence.gpu.answer import MEASURED, NO_MEMORY

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """A figure and its bound.

    Attributes:
        name: What it is.
        bound: The bound.
        at_least: Whether the figure is to be at least that, or else at most.
        found: The figure; None: not measured.
        why_not: Why it is not judged, if it is not.
    """

    name: str
    bound: float
    at_least: bool
    found: float | None
    why_not: str = ""

    @property
    def verdict(self) -> Literal["met", "missed", "not measured"]:
        """Whether it was reached."""
        if self.found is None or self.why_not:
            return "not measured"
        met = self.found >= self.bound if self.at_least else self.found <= self.bound
        return "met" if met else "missed"

    def as_row(self) -> dict[str, Any]:
        """Return its fields and the verdict."""
        return {
            "target": self.name,
            "bound": f"{'>=' if self.at_least else '<='} {self.bound:g}",
            "found": self.found,
            "verdict": self.verdict,
            "why_not": self.why_not or None,
        }


def targets(rows: Sequence[Row], size: str, card: str | None) -> list[Target]:
    """Return the targets, which are those of ``Dot`` with one tile and 5 label positions.

    Args:
        rows: What was measured.
        size: The name of the model's shape; only that of "full" is judged.
        card: The name of the GPU, None for a CPU; seconds are judged on an H100 alone.
    """
    why_not = "" if size == "full" and card else "they are those of InternVL3-1B on a GPU"
    seconds, original, floor = (
        _figure(rows, "step", one, "seconds") for one in (names.DOT, names.ORIGINAL, names.FLOOR)
    )
    launches, own = (
        _figure(rows, "launches", one, "launches") for one in (names.DOT, names.PASSES)
    )
    found = [row for row in agreements(rows) if row["contender"] == names.DOT]
    cosines = [row["cosine"] for row in found if row["precision"] == names.AUTOCAST]
    h100 = why_not or ("" if "H100" in (card or "") else f"that of an H100, this is {card}")
    return [
        Target("times faster than the original", 5.0, True, _ratio(original, seconds), why_not),
        Target("times the floor", 1.10, False, _ratio(seconds, floor), why_not),
        Target("full fine-tuning in 24 GB (1: yes)", 1.0, True, _fits(rows, 24.0), why_not),
        Target("cosine to float32", 0.99, True, next(iter(cosines), None), why_not),
        Target("seconds of an iteration on an H100", 0.4, False, seconds, h100),
        Target(
            "launches beyond the model's own",
            200.0,
            False,
            None if launches is None or own is None else launches - own,
            why_not,
        ),
    ]


def agreements(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return cosine and sign agreement of every contender and precision with float32."""
    measured = [row for row in rows if row["measure"] == "agreement" and row["status"] == MEASURED]
    references = {
        row["contender"]: row for row in measured if row["precision"] == names.FULL_PRECISION
    }
    found = []
    for row in measured:
        reference = references.get(names.REFERENCES.get(row["contender"], ""))
        if reference is None or row["precision"] == names.FULL_PRECISION:
            continue
        pair = row["hypergradients"], reference["hypergradients"]
        found.append(
            {
                "contender": row["contender"],
                "precision": row["precision"],
                "reference": reference["contender"],
                "cosine": cosine(*pair),
                "sign_agreement": sign_agreement(*pair),
            }
        )
    return found


_CELL = {"precision": names.AUTOCAST, "tiles": 1, "positions": 5, "examples": 1}


def _figure(rows: Sequence[Row], measure: str, contender: str, figure: str) -> float | None:
    """Return a figure at the cell that is judged."""
    wanted = {**_CELL, "measure": measure, "contender": contender, "status": MEASURED}
    return next((row[figure] for row in rows if wanted.items() <= dict(row).items()), None)


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def _fits(rows: Sequence[Row], cap: float) -> float | None:
    """Return 1 if ``Dot`` fits in so many GB, 0 if it does not."""
    wanted = {**_CELL, "measure": "cap", "contender": names.DOT, "cap": cap}
    found = {row["status"] for row in rows if wanted.items() <= dict(row).items()}
    return 1.0 if MEASURED in found else 0.0 if NO_MEMORY in found else None
