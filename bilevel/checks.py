"""One way to refuse a hyperparameter: owner, field, value found, range allowed."""

from __future__ import annotations

import math


def require(
    owner: object,
    field: str,
    value: float,
    *,
    low: float = 0.0,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = True,
) -> None:
    """Raise ValueError unless `value` lies between `low` and `high` (NaN never does).

    Args:
        owner: The object whose field it is; its class name opens the message.
        field: Name of the field, as the user wrote it.
        value: The value found.
        low: Lower end of the allowed range.
        high: Upper end of the allowed range.
        low_open: Whether `low` itself is refused.
        high_open: Whether `high` itself is refused.
    """
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if not (above and below):
        left, right = "(" if low_open else "[", ")" if high_open else "]"
        raise ValueError(
            f"{type(owner).__name__}: {field} must lie in {left}{low:g}, {high:g}{right}, "
            f"got {value!r}"
        )
