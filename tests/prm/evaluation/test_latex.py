"""LaTeX as plain text that keeps what a formula says."""

from __future__ import annotations

import pytest

from prm.evaluation.latex import last_box, plain_text

PLAIN = {
    r"\frac{1}{2x}": "1/(2x)",
    r"\frac12x": "1/2x",
    r"x\frac{1}{2}": "x*1/2",
    r"3\frac{1}{2}": "3 1/2",
    r"\frac{2}{-3}": "-2/3",
    r"\frac{-x}{-2y}": "x/(2y)",
    r"\frac{a+b}{c}": "(a+b)/c",
    r"\frac{1}{\frac{2}{3}}": "1/(2/3)",
    r"x^{2y}": "x^(2y)",
    r"x^\frac{1}{2}": "x^(1/2)",
    r"\sqrt[3]{2}": "root(3,2)",
    r"\binom{5}{2}": "binom(5,2)",
    r"\log_{2}{3}": "log_2(3)",
    r"\sin\theta": "sin(θ)",
    r"32,\!349": "32,349",
    r"0.1\overline{6}": "1/6",
    r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}": "matrix(1,2;3,4)",
    r"\left[\begin{array}{cc}1&2\end{array}\right]": "matrix(1,2)",
    r"\begin{vmatrix}1&2\\3&4\end{vmatrix}": "determinant(1,2;3,4)",
    r"+\infty": "∞",
    r"x \leqslant 2": "x ≤ 2",
    r"\textnormal{13}": "13",
}


@pytest.mark.parametrize(("text", "plain"), PLAIN.items())
def test_a_formula_keeps_its_meaning(text, plain):
    assert plain_text(text) == plain


def test_the_last_closed_box_counts():
    assert last_box(r"\boxed{1} \fbox{\frac{1}{2}}") == (10, 27, r"\frac{1}{2}")
    assert last_box(r"\boxed{\}}") == (0, 9, r"\}")
    assert last_box(r"\boxed{1} \boxed{2") == (0, 8, "1")
    assert last_box(r"\boxed{ } and \boxedset{3}") is None


@pytest.mark.parametrize(
    ("text", "content"),
    {
        r"-\boxed{5}": "-5",
        r"$x = - \boxed{5}$": "-5",
        r"$$-\boxed{x+1}$$": "-(x+1)",
        r"it is −\boxed{5}": "−5",
        r"Answer: $\pm\boxed{5}$": r"\pm5",
        r"\[ -\boxed{5} \]": "-5",
        # No sign: a difference, a dash, a bullet, a hyphen, an option.
        r"$7 - \boxed{5} = 2$": "5",
        r"$\frac{1}{2}-\boxed{5}$": "5",
        r"f(x) -\boxed{5}": "5",
        r"$x=7$ - \boxed{5}": "5",
        r"$$x=7$$ -\boxed{5}": "5",
        r"The answer - \boxed{5}": "5",
        "so\n- \\boxed{5}": "5",
        r"all-\boxed{5}": "5",
        r"Answer -\boxed{B}": "B",
    }.items(),
)
def test_a_sign_in_front_of_a_box_belongs_to_it(text, content):
    box = last_box(text)
    assert box is not None
    assert box[2] == content


def test_a_root_of_nothing_is_text():
    assert plain_text(r"\sqrt[3]{}") == "root(3,)"
