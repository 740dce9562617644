"""Math-Verify may join two answers that are equal by algebra, and nothing else."""

from __future__ import annotations

import builtins

import pytest

from prm.evaluation.answers import answer_classes, canonical_answer
from prm.evaluation.second_opinion import comparable, load_math_verify
from tests.prm.evaluation.answer_pairs import EQUAL_BY_ALGEBRA, UNEQUAL


@pytest.fixture(scope="module")
def same():
    return load_math_verify()


@pytest.mark.parametrize(("first", "second"), EQUAL_BY_ALGEBRA)
def test_answers_that_are_equal_by_algebra_are_joined(same, first, second):
    assert canonical_answer(first) != canonical_answer(second)
    one, other = answer_classes([first, second], same)
    assert one == other == canonical_answer(first)


def test_no_unequal_answers_are_joined(same):
    """Math-Verify alone joins some 40 of these pairs."""
    for first, second in UNEQUAL:
        assert not same(first, second), (first, second)
        assert not same(second, first), (second, first)


REFUSED = [
    ("12", "12 cm"), ("50", "50%"), ("0.333333", "1/3"), ("{1,2}", "(1,2)"), ("[1,2]", "(1,2)"),
    ("1, 2", "2, 1"), ("(1,2)", "(1,2,3)"), ("x=1", "y=1+x"), ("4π cm", "4π"), ("1:2", "0.5+0"),
    ("x > 3", "(3, ∞)"), ("x+1=3", "x=2"), ("x < y", "x ≤ y"), ("B", "b+0"), ("no", "on"),
    ("1/2x", "x/2"), ("2020-01-02", "2017"), ("1011_2", "1011_3"), ("2^99999", "2^99998*2"),
    ("9^9^9", "9^9^9+0"), (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("red + blue", "blue + red"),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second"), REFUSED)
def test_some_answers_are_never_compared(first, second):
    assert not comparable(first, second)
    assert not comparable(second, first)


def test_near_values_are_two(same):
    assert not same(r"\sqrt{2}+\sqrt{3}", r"\frac{3146264369942}{1000000000000}+\sqrt{0}")
    assert not same(r"\frac{355}{113}+0", r"\pi")
    assert not same("3.14159265358979323846", r"\pi")


def test_a_class_is_joined_only_if_it_is_the_same_as_all_of_another():
    known = {frozenset("ab"), frozenset("bc")}
    found = answer_classes(
        ["aa1", "bb1", "cc1", None], lambda one, other: frozenset(one[0] + other[0]) in known
    )
    assert found == ["aa1", "aa1", "cc1", None]


def test_without_the_library_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "math_verify":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ModuleNotFoundError, match=r"bilevel-prm\[math\]"):
        load_math_verify()
