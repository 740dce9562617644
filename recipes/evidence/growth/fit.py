"""Exponents of growth: a line through log sizes and log figures."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.evidence.bench.measure import Timed, in_rounds


@dataclass(frozen=True)
class PowerLaw:
    """``figure = factor · size ** exponent``, by least squares of the logarithms.

    Attributes:
        exponent: Of the whole range.
        factor: The figure at size 1.
        residual: Root mean square of ln(figure) − ln(fit): 0.05 is 5 % off.
        last: The exponent between the two largest sizes. What a figure has beside the growth, a
            constant say, lowers the exponent of the range more than this one.
    """

    exponent: float
    factor: float
    residual: float
    last: float


def power_law(sizes: Sequence[float], figures: Sequence[float]) -> PowerLaw:
    """Fit a power law.

    Raises:
        ValueError: Fewer than two different sizes, or a size or figure that is not positive.
    """
    if len(set(sizes)) < 2 or len(sizes) != len(figures):
        raise ValueError(
            f"expected figures of at least two sizes, found sizes {list(sizes)} and "
            f"{len(figures)} figures"
        )
    if min(*sizes, *figures) <= 0:
        raise ValueError(f"expected positive numbers, found {list(sizes)} and {list(figures)}")
    x, y = ([math.log(value) for value in values] for values in (sizes, figures))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    exponent = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum(
        (a - mean_x) ** 2 for a in x
    )
    level = mean_y - exponent * mean_x
    squares = [(b - level - exponent * a) ** 2 for a, b in zip(x, y, strict=True)]
    order = sorted(zip(x, y, strict=True))
    (x0, y0), (x1, y1) = order[-2:]
    return PowerLaw(
        exponent,
        math.exp(level),
        math.sqrt(sum(squares) / len(squares)),
        (y1 - y0) / (x1 - x0),
    )


def milliseconds(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median processor milliseconds of functions that take turns."""
    timed = {name: Timed(run) for name, run in runs.items()}
    seconds = in_rounds(timed, rounds, clock=time.process_time)
    return {name: round(1000 * statistics.median(one[name] for one in seconds), 3) for name in runs}


def fitted(
    axis: str, rows: Sequence[Mapping[str, Any]], quantities: Sequence[str]
) -> dict[str, Any]:
    """Return the rows of an axis with the fit of each quantity.

    Args:
        axis: What grows.
        rows: For each size ``{"size": …, quantity: …}``.
        quantities: The quantities. One that is 0 or missing at a size is fitted without it.
    """
    fits = {}
    for quantity in quantities:
        known = [(row["size"], row[quantity]) for row in rows if row.get(quantity)]
        if len(known) < 2:
            continue
        law = power_law(*zip(*known, strict=True))
        fits[quantity] = {
            "exponent": round(law.exponent, 3),
            "residual": round(law.residual, 3),
            "last": round(law.last, 3),
            "from": known[0][0],
            "to": known[-1][0],
        }
    return {"axis": axis, "rows": list(rows), "fits": fits}
