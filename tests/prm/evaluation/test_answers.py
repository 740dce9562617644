"""Answers that say the same are one string; answers that do not are two."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prm.evaluation.answers import answer_classes, canonical_answer
from tests.prm.evaluation.answer_pairs import EQUAL, EQUAL_BY_ALGEBRA, UNEQUAL

SAME = {
    "7/2": [
        "3.50", "7/2", " 3.5 ", "+3.5", "3 1/2", "3½", "35e-1", "3.5.", "(3.5)", "x = 3.5",
        r"\frac{7}{2}", r"\dfrac72", r"3\tfrac{1}{2}", r"$\frac{7}{2}$", r"\(3.5\)",
        r"\boxed{\frac{7}{2}}", r"Thus 5 - 1.5 = \boxed{3.5}.", r"\boxed{1} or rather \boxed{3.5}",
        "The answer is 3.5", "Answer: 3.5", "So the final answer is: 3.5.", "**3.5**",
        r"0.35 \times 10^{1}", "$x=3.5$", "0.35*10^1", "３.５",
    ],
    "-1/2": ["-0.5", "−0.5", "–1/2", "-.5", r"-\frac{1}{2}", r"\frac{-1}{2}", "- 0.5"],
    "1234": ["1,234", "1{,}234", r"1\,234", "1234.0", "1.234e3"],
    "2000000": ["2 million", "2,000,000", r"2\times10^6"],
    "12 cm": ["12 cm", "12cm", "12 CM.", "12 centimeters", "12 centimetres", r"12\text{ cm}"],
    "12 cm^2": ["12 cm^2", "12 cm²", "12 square centimeters", "12 sq cm", r"12 \mathrm{cm}^{2}"],
    "5 m/s": ["5 m/s", "5 m per s", "5 meters per second", "5.0 m / s"],
    "3 $": ["$3", r"\$3.00", "3 dollars", "3 $", "3 USD"],
    "50 %": ["50%", "50 percent", r"50\%", "50.0 %"],
    "30 °": ["30°", r"30^\circ", r"$30^{\circ}$", "30 degrees"],
    "3 apple": ["3 apples", "3 Apple"],
    "B": ["B", "b", "(B)", "(b)", "B.", "[B]", "B:", "B) 12 cm", "(B) 12 cm", "option B",
          "The correct answer is (B).", r"\boxed{\text{B}}", "Choice: B"],
    "A,C": ["A and C", "(A), (C)", "C, A", "A, C"],
    "(1, 2)": ["(1,2)", "(1.0, 2)", r"\left(1, \frac{4}{2}\right)"],
    "{1, 2}": ["{2, 1}", r"\{1,2\}"],
    "1, 2": ["1, 2", "1 and 2", "1.0,2"],
    "sqrt(3)/2": [r"\frac{\sqrt{3}}{2}", "sqrt(3)/2", r"\sqrt3/2"],
    "x^2+1": ["x^2 + 1", r"x^{2}+1", "X^2+1"],
    "dark blue": ["Dark  blue", '"dark blue"', r"\text{dark blue}", "dark blue."],
}  # fmt: skip
DIFFERENT = [
    ("0.33", "1/3"), ("12 cm", "12 m"), ("12 cm", "12"), ("0.5", "50%"), ("5m", "5 m"), ("5x", "5"),
    ("(1,234)", "1,234"), ("(1, 2)", "(2, 1)"), ("(1, 2)", "[1, 2]"), ("1", "-1"), ("A", "B"),
    (r"-\boxed{5}", r"\boxed{5}"), (r"$x=-\boxed{5}$", "5"), (r"\pm\boxed{5}", "5"),
    ("1,2,3,…", "1,2,3"), ("1, 2, 3, ...", "1, 2, 3"), ("0.333...", "0.333"), ("2; 4; ...", "2; 4"),
    ("12 cm^2", "12 cm"), ("A,C", "A"), ("1 or 2", "12"), ("2 sqrt(3)", "2"), ("$3", "€3"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "canonical"), [(text, form) for form, texts in SAME.items() for text in texts]
)
def test_equal_answers_are_one(text, canonical):
    assert canonical_answer(text) == canonical


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_different_answers_are_two(first, second):
    assert canonical_answer(first) != canonical_answer(second)


# One test for each table of hundreds of pairs: to begin a test takes longer than a pair.


def test_two_spellings_of_an_answer_are_one():
    wrong = [pair for pair in EQUAL if len(set(map(canonical_answer, pair))) != 1]
    assert wrong == []


def test_two_answers_that_look_alike_are_two():
    wrong = [pair for pair in UNEQUAL if len(set(map(canonical_answer, pair))) != 2]
    assert wrong == []


def test_a_canonical_form_of_any_answer_is_its_own():
    found = {text: canonical_answer(text) for pair in EQUAL + UNEQUAL for text in pair}
    wrong = [text for text, once in found.items() if canonical_answer(once) != once]
    assert wrong == []


def test_the_pairs_are_many_and_a_third_is_unequal():
    count = len({*EQUAL, *UNEQUAL, *EQUAL_BY_ALGEBRA})
    assert count >= 500
    assert len(UNEQUAL) > count / 3


@pytest.mark.parametrize("text", [None, "", "  \n"])
def test_no_answer(text):
    assert canonical_answer(text) is None


@pytest.mark.parametrize(
    "text",
    ["1/0", "1e999999999", "9" * 5000, "1/" + "3" * 5000, "2^10^10", "$", "{", "="],
)
def test_what_is_no_number_stays_text(text):
    assert canonical_answer(text) == text


@pytest.mark.parametrize("canonical", [*SAME, *(text for pair in DIFFERENT for text in pair)])
def test_a_canonical_form_is_its_own(canonical):
    once = canonical_answer(canonical)
    assert canonical_answer(once) == once


@given(st.integers(-(10**9), 10**9), st.integers(1, 10**4))
def test_fractions_are_exact(above, below):
    assert canonical_answer(rf"\frac{{{above}}}{{{below}}}") == str(Fraction(above, below))


@given(
    st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-1000, max_value=1000)
)
def test_decimals_are_exact(number):
    assert canonical_answer(f"{number:f}") == str(Fraction(number))


@given(st.text(max_size=40))
def test_any_text_has_a_form(text):
    assert (canonical_answer(text) is None) == (not text.strip())


def test_a_bare_number_joins_the_only_unit_given_to_it():
    answers = ["12", "12 cm", "14", None, "14 m", "14 cm", "12 centimetres", "x"]
    assert answer_classes(answers) == [
        "12 cm", "12 cm", "14", None, "14 m", "14 cm", "12 cm", "x"
    ]  # fmt: skip
    assert answer_classes(["50", "50%", "0.5"]) == ["50 %", "50 %", "1/2"]
    assert answer_classes([]) == []


def test_two_coordinates_of_one_value_are_two_answers_and_one_alone_is_the_value():
    assert answer_classes(["x = 5", "y = 5", "$x=5$", "5"]) == ["x=5", "y=5", "x=5", "5"]
    assert answer_classes(["x = 5", "5", "n = 5", "y = 6"]) == ["5", "5", "5", "6"]
    assert answer_classes(["y = 2 cm", "x = 2 cm", "y = 2"]) == ["y=2 cm", "x=2 cm", "2 cm"]


@pytest.mark.parametrize(("first", "second"), [("rises", "falls"), ("5", "7"), ("yes", "no")])
@pytest.mark.parametrize(
    "form", ["A. {}, B. {}", "(A) {} (B) {}", "A: {}; B: {}", "A) {} and B) {}"]
)
def test_texts_that_are_given_to_several_letters_are_not_exchanged(form, first, second):
    one, other = form.format(first, second), form.format(second, first)
    assert len({canonical_answer(text) for text in (one, other, "A", "B", "A, B")}) == 5
