"""Where the labelled Game of 24 lies, if it does."""

from __future__ import annotations

from pathlib import Path

import pytest

_PLACES = (
    Path(__file__).parents[4] / "data" / "game24" / "candidates.jsonl",
    Path(__file__).parents[5] / "shared" / "data" / "game24" / "candidates.jsonl",
)


def source() -> Path:
    """The file; skips the test where there is none."""
    for path in _PLACES:
        if path.is_file():
            return path
    pytest.skip(f"{_PLACES[0]} is not there: python -m recipes.evidence.smollm2.label makes it")
