"""Fixtures of the core's tests."""

from __future__ import annotations

import pytest

from bilevel.lower import kept_graph


@pytest.fixture
def large(monkeypatch) -> None:
    """No problem counts as small: no graph of a lower pass is kept for its product."""
    monkeypatch.setattr(kept_graph, "_SMALL_PARAMS", 0)
