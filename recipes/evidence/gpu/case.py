"""What is measured, in order: what is left out when time ends is what says least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Measure = Literal["step", "launches", "cap", "agreement"]

ORIGINAL, FLOOR, PASSES = "original", "floor", "passes"
DOT, GHOST, JVP, DIFFERENCE = "dot", "ghost", "jvp", "central difference"
DOT_UPPER, DOT_IDENTITY = "dot, upper-first", "dot, identity"
CONTENDERS = (FLOOR, ORIGINAL, DOT, GHOST, JVP, DIFFERENCE)
REFERENCES = {
    DOT: DOT,
    GHOST: DOT_UPPER,
    JVP: DOT_UPPER,
    DIFFERENCE: DOT_UPPER,
    ORIGINAL: DOT_IDENTITY,
}
"""The contender that computes the same quantity without an approximation, in float32."""

AUTOCAST, PURE, FULL_PRECISION = "bf16", "bf16-pure", "float32"
TILES, POSITIONS = (1, 3, 5), (1, 5, 20)
CAPS = (24.0, 16.0, 80.0)
SEVERAL = 8  # examples of an iteration by ``Ghost``, whose cost per example falls with them


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        measure: "step": seconds and memory; "launches": of kernels, and waits of the host; "cap":
            whether the first two iterations fit in so much memory; "agreement": the hypergradients
            of several iterations.
        contender: Who.
        precision: Of θ and of the passes, as the option ``--precision``.
        tiles: Of the image.
        positions: Label positions.
        examples: Lower examples of an iteration, and as many upper ones.
        cap: Memory of the process in GB of 10⁹ bytes, for "cap".
    """

    measure: Measure
    contender: str
    precision: str = AUTOCAST
    tiles: int = 1
    positions: int = 5
    examples: int = 1
    cap: float | None = None

    def as_row(self) -> dict[str, Any]:
        """Return the fields, with which its row begins."""
        return asdict(self)

    def __str__(self) -> str:
        many = "" if self.examples == 1 else f", {self.examples} examples"
        cap = "" if self.cap is None else f" in {self.cap:g} GB"
        return (
            f"{self.measure}: {self.contender}{cap}, {self.precision}, {self.tiles} "
            f"tile{'' if self.tiles == 1 else 's'}, {self.positions} "
            f"position{'' if self.positions == 1 else 's'}{many}"
        )


def cases(
    tiles: Sequence[int] = TILES,
    positions: Sequence[int] = POSITIONS,
    caps: Sequence[float] = CAPS,
    contenders: Sequence[str] = CONTENDERS,
) -> list[Case]:
    """Return all cases: those of the first cell of the grid, agreement, then the other cells.

    Args:
        tiles: Tiles of the grid.
        positions: Label positions of the grid; 5 of them are the first cell's, if there.
        caps: Caps on memory in GB.
        contenders: Who is measured; the references of the agreement come with them.
    """
    near = 5 if 5 in positions else positions[0]
    first = (tiles[0], near)
    # From corner to corner, so that the ends of both scales come early.
    others = sorted(
        ((t, p) for t in tiles for p in positions if (t, p) != first),
        key=lambda cell: (cell[0] != tiles[-1] or cell[1] != positions[-1], cell[1] != near),
    )
    compared = [one for one in REFERENCES if one in contenders]
    references = dict.fromkeys(REFERENCES[one] for one in compared)
    found = [Case("step", one, AUTOCAST, *first) for one in contenders]
    found += [Case("launches", one, AUTOCAST, *first) for one in (PASSES, *contenders)]
    found += [Case("cap", one, AUTOCAST, *first, cap=cap) for cap in caps for one in contenders]
    found += [Case("agreement", one, FULL_PRECISION, *first) for one in references]
    found += [Case("agreement", one, AUTOCAST, *first) for one in compared]
    found += [Case("agreement", one, PURE, *first) for one in compared]
    found += [Case("step", one, PURE, *first) for one in contenders]
    if GHOST in contenders:
        found += [Case("step", GHOST, AUTOCAST, t, near, SEVERAL) for t in tiles]
    found += [Case("step", one, AUTOCAST, *cell) for cell in others for one in contenders]
    found += [
        Case("cap", one, AUTOCAST, *cell, cap=cap)
        for cap in caps
        for cell in others
        for one in contenders
    ]
    return found
