"""How far hypergradients are from those of float32."""

from __future__ import annotations

import math
from collections.abc import Sequence


def cosine(found: Sequence[float], reference: Sequence[float]) -> float | None:
    """Return ``⟨x, y⟩ / (‖x‖ ‖y‖)``, None if one of them is 0 or not finite.

    Raises:
        ValueError: They have different lengths.
    """
    lengths = math.hypot(*found) * math.hypot(*reference)
    if not lengths or not math.isfinite(lengths):
        return None
    return math.fsum(x * y for x, y in zip(found, reference, strict=True)) / lengths


def sign_agreement(found: Sequence[float], reference: Sequence[float]) -> float:
    """Return the share of entries with the sign of the reference; 0 agrees with 0 alone.

    Raises:
        ValueError: They have different lengths, or there are none.
    """
    if not found:
        raise ValueError("expected hypergradients to compare, found none")

    def sign(x: float) -> int:
        return (x > 0) - (x < 0)

    return sum(sign(x) == sign(y) for x, y in zip(found, reference, strict=True)) / len(found)
