"""Cosine and signs against closed forms."""

from __future__ import annotations

import math

import pytest

from recipes.evidence.gpu.agreement import cosine, sign_agreement


def test_cosines_of_known_angles():
    assert cosine([3.0, 4.0], [6.0, 8.0]) == pytest.approx(1.0, abs=1e-15)
    assert cosine([1.0, 0.0], [0.0, 2.0]) == 0.0
    assert cosine([1.0, 0.0], [-1.0, 1.0]) == pytest.approx(-math.sqrt(0.5), abs=1e-15)
    assert cosine([1e-200, 1e-200], [1e-200, 0.0]) is None  # its length is not representable


def test_nothing_has_no_direction():
    assert cosine([0.0, 0.0], [1.0, 0.0]) is None
    assert cosine([math.nan], [1.0]) is None


def test_shares_of_equal_signs():
    assert sign_agreement([1.0, -2.0, 0.0, 5.0], [3.0, 1.0, 0.0, 1e-9]) == 0.75
    assert sign_agreement([0.0], [1.0]) == 0.0


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        cosine([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"shorter|longer"):
        sign_agreement([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="found none"):
        sign_agreement([], [])
