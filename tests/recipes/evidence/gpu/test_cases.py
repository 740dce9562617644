"""The list of what is measured covers the grid, and its most telling cells come first."""

from __future__ import annotations

from recipes.evidence.gpu import case
from recipes.evidence.gpu.case import Case, cases

STEPS = [one for one in cases() if one.measure == "step"]


def test_every_cell_of_the_grid_has_every_contender_and_cap():
    cells = {(tiles, positions) for tiles in (1, 3, 5) for positions in (1, 5, 20)}
    wanted = {(one, *cell) for one in case.CONTENDERS for cell in cells}
    bf16 = [one for one in STEPS if one.precision == "bf16" and one.examples == 1]
    assert {(one.contender, one.tiles, one.positions) for one in bf16} == wanted
    capped = [one for one in cases() if one.measure == "cap"]
    assert len(capped) == len({*capped}) == 3 * len(wanted)
    assert {(one.contender, one.tiles, one.positions) for one in capped} == wanted
    assert {one.cap for one in capped} == {80.0, 24.0, 16.0}


def test_nothing_is_measured_twice():
    assert len(cases()) == len({*cases()})


def test_the_cell_of_the_targets_comes_first():
    first = cases()[: len(case.CONTENDERS)]
    assert {one.contender for one in first} == {*case.CONTENDERS}
    assert {(one.tiles, one.positions, one.precision) for one in first} == {(1, 5, "bf16")}
    others = [(one.tiles, one.positions) for one in STEPS if one.examples == 1]
    assert next(cell for cell in others if cell != (1, 5)) == (5, 20)


def test_every_agreement_comes_after_its_reference():
    seen = set()
    for one in cases():
        if one.measure == "agreement" and one.precision == "float32":
            seen.add(one.contender)
        elif one.measure == "agreement":
            assert case.REFERENCES[one.contender] in seen


def test_a_choice_of_contenders_brings_their_references():
    found = cases([1], [5], [24.0], ["floor", "original"])
    others = {one.contender for one in found} - {"floor", "original"}
    assert others == {"passes", "dot, identity"}
    assert not [one for one in found if one.examples > 1]


def test_another_grid_has_its_own_first_cell():
    found = cases([2], [1, 3], [])
    assert (found[0].tiles, found[0].positions) == (2, 1)
    assert not [one for one in found if one.cap is not None]


def test_a_case_says_what_it_is():
    one = Case("cap", "dot", tiles=3, positions=1, cap=24.0)
    assert str(one) == "cap: dot in 24 GB, bf16, 3 tiles, 1 position"
    many = Case("step", "ghost", "bf16-pure", examples=8)
    assert str(many) == "step: ghost, bf16-pure, 1 tile, 5 positions, 8 examples"
