"""Case is dropped where it has no meaning, and nowhere else."""

from __future__ import annotations

import pytest

from prm.evaluation.letter_case import is_without_case, without_case


@pytest.mark.parametrize(
    ("word", "after", "written"),
    [
        ("Cat", "", "cat"), ("TRUE", "", "true"), ("No", "", "no"), ("NO", " solution", "no"),
        ("A", " cat", "a"), ("A", "", "A"), ("A", " b", "A"), ("X", "-ray", "x"),
        ("X", "-sin(x)", "X"), ("T", "", "T"), ("CO", "", "CO"), ("Co", "", "Co"),
        ("Ln", "(2)", "ln"), ("Cos", " x", "cos"), ("CoS", "", "CoS"),
        ("CoCl", "", "CoCl"), ("COCl", "", "COCl"), ("COCL", "", "cocl"), ("NaCl", "", "nacl"),
        ("AaBb", "", "AaBb"), ("AABB", "", "AABB"), ("Anna", "", "anna"),
        ("YouTube", "", "youtube"),
        ("Γ", "", "Γ"), ("ÄRGER", "", "ärger"), ("Δx", "", "Δx"),
    ],
)  # fmt: skip
def test_case_is_kept_where_it_has_a_meaning(word, after, written):
    assert without_case(word, after) == written
    assert without_case(written, after) == written


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0xFF", True), ("1F_16", True), ("1F_(16)", True), ("1F_17", False), ("X^2+1", True),
        ("X^2+Y^2=1", True), ("X^2+y", False), ("X", False), ("3X", False), ("T^2+1", False),
    ],
)  # fmt: skip
def test_numbers_in_base_16_and_formulas_of_capital_unknowns_have_no_case(text, expected):
    assert is_without_case(text) is expected
