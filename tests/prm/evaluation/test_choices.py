"""Letters of a multiple choice are told from variables, words, names and formulas."""

from __future__ import annotations

import pytest

from prm.evaluation.choices import choice

CHOICES = {
    "B": ["B", "b", "(B)", "[b]", "B.", "B:", "$B", "B) 12", "(B) 12 cm", "B. 12 cm", "B: the cat",
          "B - 12 cm", "B - none of these", "B (12 cm)", "B. vitamins A and C", "B. Point A",
          "B) P(A)", "(B) Both (A) and (D)", "B. only A", "B: none of A, C and D",
          "B. vitamin C, vitamin D"],
    "I": ["I", "(I)", "I.", "I. 12 cm", "I) 12", "(I) 12"],
    "Q": ["Q", "(Q)", "Q) 12 cm", "(Q) none"],
    "A,C": ["A,C", "C, A", "A and C", "A & C", "(A), (C)", "A; C", "AC", "(A)(C)", "A, and C"],
    "I,J": ["I and J", "J, I"],
    "A,B,C,D": ["ABCD", "A, B, C and D"],
}  # fmt: skip
NO_CHOICES = [
    "i", "x", "n", "(i)", "(x)", "I am", "AI", "BE", "AD", "ACE", "BAD", "CAB", "AA", "B - 12",
    "B - A", "A - sin x", "A - 2x + yz", "J. K. Rowling", "K. text", "Q: text", "A or C", "12", "",
    "ab", "A cat", "-A", "A1",
    "A. 5, C. 7", "B: 5; D: 6", "(A) x = 1 and (C) x = 2", "A) 5 C) 7", "A. 5 and C. 7",
    "A: yes, B: no", "A. B and C", "D. A, B", "A: B", "A. 5 or C", "A - 5 cm, C - 7 cm",
    "A. 5 and C", "(A) 3 (B)(D) 4", "B (12)", "P(A)",
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "letters"), [(text, letters) for letters, texts in CHOICES.items() for text in texts]
)
def test_choices_are_letters(text, letters):
    assert choice(text) == letters


@pytest.mark.parametrize("text", NO_CHOICES)
def test_what_may_be_something_else_is_no_choice(text):
    assert choice(text) is None
