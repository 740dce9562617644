r"""A second opinion on two answers whose canonical forms differ: algebra by Math-Verify.

Math-Verify (https://github.com/huggingface/Math-Verify, extra ``math``) reads answers with sympy.
It is asked only whether two answers are equal that are two by their form, such as 2√8 and 4√2, so
that it can join and never split. It is generous with units, brackets and rounding, so these are
never joined, whatever it says:

- choices, and answers with words or of letters alone;
- two numbers, whose forms are exact; a number or text with a unit, and any other;
- answers with different names ("x" and "y", "4π cm" and "4π") or with one name in both cases (x
  and X), subscripts, ratios, dates;
- lists without brackets, a list and no list, lists in different brackets or of different lengths,
  and matrices of different kinds or shapes;
- a relation and none (x > 3 and an interval), or relations of different kinds;
- quotients that can be read in two ways, such as 1/2x;
- expressions that differ in value by more than 10^-40, where it would round.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from functools import lru_cache
from typing import Any

from prm.evaluation.answers import SameAnswer, answer_parts, unwrapped
from prm.evaluation.brackets import OPENING, spans, split_outside
from prm.evaluation.choices import choice
from prm.evaluation.latex import FUNCTIONS

_LONGEST = 200
_NUMBER = re.compile(r"-?\d+(?:/\d+)?")
_MATRIX = re.compile(r"(matrix|determinant|norm|array)\(")
_NAME = re.compile(r"[^\W\d_]+")
_CONSTANTS = frozenset({"π", "e", "i"})
_SIGNS = "=<≤≠∈±∓!%°'\"∪∩|…→×"
"""Signs of which both answers must have as many."""
_COSTLY = re.compile(r"\^\(?-?\d{4,}|\^[^+*/=,]*\^|\d{40,}")
_NO_FORMULA = re.compile(
    r"[^\W\d_]{2,}|\d+(?:-\d+)+|.*[_:].*|[<>≤≥=].*|.*[<>≤≥=]"
    r"|.*(?:\d \d|\d\.\d+\.|[A-Za-z]\d|\([A-Za-z]\)\d).*"
)
"""Words, dates, ratios, half a relation, numbers side by side, versions ("v1.0"), "(a) 3 (b) 4"."""
_TWO_READINGS = re.compile(r"/\s*(?:\d+|[A-Za-z])\s*[A-Za-z(\\]|frac\s*(?:\d\s*){3}")
_DECIMAL = re.compile(r"(?<![\d,])(\d*)\.(\d+)(?![\d.])")
_DIGITS = 60
_NEAR = 1e-40
_FONT = re.compile(r"\\(?:math(?:bf|rm|it|sf)|boldsymbol|bm)\s*\{([^{}]*)\}")
_UNKNOWN_SIGN = re.compile(r"[^\x00-\x7fͰ-Ͽ√∞≤≥≠±∓∅∪∩∈°…→]")


def load_math_verify() -> SameAnswer:
    """Return the second opinion, a function of two answers.

    It must be called in the main thread, where Math-Verify limits its time by a signal.

    Raises:
        ModuleNotFoundError: Math-Verify is not installed; the message names the extra.
    """
    try:
        import math_verify
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "expected the library math-verify, found none; install the extra: "
            'pip install "bilevel-prm[math]"'
        ) from error
    for name in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)  # A formula that it cannot read is no news.

    @lru_cache(maxsize=4096)
    def parsed(text: str) -> tuple[Any, ...]:
        found = math_verify.parse(f"${text}$", fallback_mode="no_fallback", parsing_timeout=2)
        return tuple(found)

    def same(first: str, second: str) -> bool:
        if not comparable(first, second):
            return False
        left, right = (parsed(_for_parser(text)) for text in (first, second))
        if not left or not right:
            return False
        return bool(
            math_verify.verify([*left], [*right], timeout_seconds=2, float_rounding=_DIGITS)
            and math_verify.verify([*right], [*left], timeout_seconds=2, float_rounding=_DIGITS)
            and _near(left[0], right[0])
            and all(map(_is_whole, (first, second), (left[0], right[0])))
        )

    return same


def comparable(first: str, second: str) -> bool:
    """Return whether the second opinion counts for two answers, by the list of this module."""
    if _TWO_READINGS.search(first) or _TWO_READINGS.search(second):
        return False
    parts = [answer_parts(first), answer_parts(second)]
    if any(unit is not None for _, unit in parts):
        return False
    one, other = (value for value, _ in parts)
    if one is None or other is None or max(len(one), len(other)) > _LONGEST:
        return False
    if any(_is_no_formula(value) for value in (one, other)):
        return False
    if _NUMBER.fullmatch(one) and _NUMBER.fullmatch(other):
        return False
    outline = _outline(one)
    names = outline[-1]
    if len({name.casefold() for name in names}) < len(names):
        return False  # Math-Verify takes x and X for one name.
    return bool(outline == _outline(other))


def _is_no_formula(value: str) -> bool:
    """Return whether a canonical value is a choice, words, a bare list, or too costly to read."""
    if choice(value) or _NO_FORMULA.fullmatch(value):
        return True
    if _COSTLY.search(value) or _UNKNOWN_SIGN.search(value):
        return True
    if not _MATRIX.match(value) and len(split_outside(value, ",")) > 1:
        return True
    return any(
        len(name) > 2 and name not in FUNCTIONS and not _MATRIX.match(f"{name}(")
        for name in _NAME.findall(value)
    )


def _outline(value: str) -> tuple[Any, ...]:
    """Return what must be the same in two answers for them to be compared by algebra."""
    names = {
        letter
        for name in _NAME.findall(value)
        if name not in FUNCTIONS and not _MATRIX.match(f"{name}(")
        for letter in name
    }
    return _shape(value), Counter(sign for sign in value if sign in _SIGNS), names - _CONSTANTS


def _shape(value: str) -> tuple[Any, ...]:
    """Return the brackets and the length of a list, or the kind and the shape of a matrix."""
    if matrix := _MATRIX.match(value):
        rows = split_outside(value[matrix.end() : -1], ";")
        return matrix[1], [len(split_outside(row, ",")) for row in rows]
    if value[:1] in OPENING and spans(value):
        inner = split_outside(value[1:-1], ",")
        if len(inner) > 1 or value[0] != "(":
            return value[0], value[-1], len(inner)
    return ()


def _for_parser(answer: str) -> str:
    """Return an answer as LaTeX, its decimals as fractions, which sympy takes exactly."""
    text = _FONT.sub(r"{\1}", unwrapped(answer))
    text = re.sub(r"√\s*(\d+|[A-Za-z])", r"\\sqrt{\1}", text)
    text = re.sub(r"(?:√|(?<!\\)sqrt\s*)\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])|π", r"\\pi ", text)
    return _DECIMAL.sub(lambda m: rf"\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}", text)


def _is_whole(answer: str, parsed: Any) -> bool:
    """Return False where the parser stopped in front of the names of an answer, as at a font."""
    value, _ = answer_parts(answer)
    return not getattr(parsed, "is_number", False) or not _outline(value or "")[2]


def _near(first: Any, second: Any) -> bool:
    """Return whether two expressions have one value, also where sympy would round.

    Names get values without a relation to each other. What is no expression, such as a set or a
    relation, is left to Math-Verify.
    """
    if not hasattr(first, "evalf") or not hasattr(second, "evalf"):
        return True
    if not getattr(first, "is_number", False) and not getattr(first, "free_symbols", None):
        return True
    try:
        names = sorted(first.free_symbols | second.free_symbols, key=str)
        for start in (3, 11):
            values = {name: (start + 7 * place) ** 0.5 for place, name in enumerate(names)}
            values = {name: round(value * 2**20) / 2**20 for name, value in values.items()}
            difference = (first - second).evalf(_DIGITS, subs=values)
            if not abs(complex(difference)) < _NEAR * 10:
                return False
    except (TypeError, ValueError, AttributeError, ZeroDivisionError):
        return True
    return True
