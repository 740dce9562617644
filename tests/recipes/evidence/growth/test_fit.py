"""Exponents: of exact power laws, of what has a constant beside it, of noise."""

from __future__ import annotations

import math

import pytest

from recipes.evidence.growth.fit import fitted, milliseconds, power_law

SIZES = (1, 10, 100, 1000)


def test_a_power_law_is_found_exactly():
    law = power_law(SIZES, [3 * size**1.5 for size in SIZES])
    assert law.exponent == pytest.approx(1.5)
    assert law.factor == pytest.approx(3)
    assert law.last == pytest.approx(1.5)
    assert law.residual == pytest.approx(0, abs=1e-12)


def test_a_constant_beside_the_growth_shows_in_residual_and_last():
    law = power_law(SIZES, [100 + size for size in SIZES])
    assert law.exponent < 0.5 < law.last < 1
    assert law.residual > 0.2


def test_the_residual_is_that_of_the_logarithms():
    """Symmetric about a flat line: deviations of ln 2 that no line follows."""
    law = power_law((1, 2, 4, 8), (2, 1, 1, 2))
    assert law.exponent == pytest.approx(0, abs=1e-12)
    assert law.residual == pytest.approx(math.log(2) / 2)


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="at least two sizes"):
        power_law([4, 4], [1, 2])
    with pytest.raises(ValueError, match="positive numbers"):
        power_law([1, 2], [0, 2])


def test_rows_are_fitted_by_quantity():
    rows = [{"size": size, "a": size, "b": 0 if size == 1 else size**2} for size in SIZES]
    found = fitted("axis", rows, ("a", "b", "missing"))
    assert found["rows"] == rows
    assert found["fits"]["a"] == {"exponent": 1, "residual": 0, "last": 1, "from": 1, "to": 1000}
    assert found["fits"]["b"] == {"exponent": 2, "residual": 0, "last": 2, "from": 10, "to": 1000}
    assert set(found["fits"]) == {"a", "b"}


def test_times_are_those_of_the_processor():
    found = milliseconds({"busy": lambda: sum(range(200_000)), "idle": lambda: None}, 2)
    assert found["busy"] > 10 * found["idle"] >= 0
