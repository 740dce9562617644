r"""Canonical forms of final answers: equal answers become equal strings, which can be voted on.

``canonical_answer`` applies these rules, in this order:

1. Blank: no answer. Unicode forms are unified (NFKC; minus signs and dashes are "-", "½" is "1/2").
2. The last ``\boxed{...}`` stands for the whole; "the answer is", "Answer:" and "Option" in front
   are removed, as are math delimiters and a final full stop.
3. LaTeX: ``\frac{a}{b}`` is a/b, ``\text{x}`` is x, ``\sqrt{a}`` is sqrt(a), ``\%`` is %, and
   ``^\circ`` is °. Spacing, ``\left`` and ``\right`` are removed.
4. Choice letters A to H: "(b)", "B.", "B) 12 cm", "option B" are "B"; "A and C" is "A,C".
5. A variable in front is removed: "x = 5" is "5".
6. Numbers are exact: "3.50", "7/2", "3 1/2", "35e-1" are "7/2"; "1,234" is "1234"; "2 million" is
   "2000000". Nothing is rounded: "0.33" is not "1/3".
7. Units behind a number, known ones by their symbol: "12 centimetres" is "12 cm", "$3" is "3 $",
   "50 percent" is "50 %", "5 m per s" is "5 m/s". A single-letter unit needs a space ("5m" may be
   5·m). Other words of three letters or more are a unit too: "3 apples" is "3 apple". Units are
   never converted.
8. Lists in brackets, or of numbers, element by element: "(1.0,2)" is "(1, 2)"; sets {...} in
   sorted order.
9. Anything else: lower case, one space between words, none around operators.

An answer of more than 2000 characters, and any part that is nested more than 20 brackets deep, is
compared as text, by rule 9.

A number without a unit and the same number with one are different answers. ``answer_classes``
considers all candidates of a question and merges the two where the unit is unambiguous.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

from prm.evaluation.latex import boxed, plain_text
from prm.evaluation.units import UNIT_SYMBOLS, unit_of

_LONGEST_NUMBER = 300
"""The number of characters, or the exponent, beyond which a number is treated as text."""
_LONGEST_ANSWER = 2_000
_DEEPEST_LIST = 20
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_LEAD = re.compile(
    r"^(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:final\s+|correct\s+)?"
    r"(?:(?:answer|result)\s*(?:is\s*:?|:|=)|(?:option|choice)\s*:?)\s*",
    re.IGNORECASE,
)
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_PLAIN = rf"(?:{_WHOLE}(?:\.\d*)?|\.\d+)"
_POWER = r"(?:[eE][-+]?\d+|\s*(?:\*|x|×)\s*10\^\(?[-+]?\d+\)?)"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<currency>[$€£¥]?)\s*(?:"
    rf"(?P<mixed>{_WHOLE})\s+(?P<above>\d+)\s*/\s*(?P<below>\d+)"
    rf"|(?P<top>{_PLAIN})\s*/\s*(?P<bottom>{_PLAIN})"
    rf"|(?P<plain>{_PLAIN})(?P<power>{_POWER})?)(?P<rest>.*)",
    re.DOTALL,
)
_CHOICE = re.compile(r"[(\[]?\s*([A-Ha-h])\s*[)\]]?\s*[.:]?")
_CHOICE_AND_TEXT = re.compile(r"(?:[(\[]([A-H])[)\]][.:]?|([A-H])[).:])\s+\S.*", re.DOTALL)
_CHOICES = re.compile(r"[(\[]?[A-H][)\]]?(?:\s*(?:,|;|&|\band\b|,\s*and\b)\s*[(\[]?[A-H][)\]]?)+")
_ASSIGNMENT = re.compile(r"[A-Za-z](?:_\w+)?\s*=\s*([^=<>]+)")
_OPERATORS = re.compile(r"\s*([-+*/^=<>(),|])\s*")
_BRACKETS = {"(": ")", "[": "]", "{": "}"}


def canonical_answer(text: str | None) -> str | None:
    """Return the canonical form of an answer by the rules of this module; None for a blank one."""
    value, unit = _parse(text)
    return value if unit is None else f"{value} {unit}"


def answer_classes(answers: Sequence[str | None]) -> list[str | None]:
    """Return canonical answers of one question, with a missing unit filled in if unambiguous.

    "12" counts as "12 cm" if every candidate that gives 12 with a unit gives cm. If they give
    several units, or none, it remains an answer of its own.

    Args:
        answers: The answer of each candidate. None means that it has no answer.

    Returns:
        A string per candidate, equal for those that agree, or None for a candidate without a vote.
    """
    parsed = [_parse(answer) for answer in answers]
    units: dict[str, set[str]] = {}
    for value, unit in parsed:
        if value is not None and unit is not None:
            units.setdefault(value, set()).add(unit)
    classes: list[str | None] = []
    for value, unit in parsed:
        if value is not None and unit is None and len(units.get(value, ())) == 1:
            (unit,) = units[value]
        classes.append(value if unit is None else f"{value} {unit}")
    return classes


def _parse(text: str | None) -> tuple[str | None, str | None]:
    """Return the canonical value and its unit; only a number can have a unit."""
    if text is None or not text.strip():
        return None, None
    text = _unify(text)
    if len(text) > _LONGEST_ANSWER:
        return _words(text), None
    text = _unwrap(text)
    return _parse_plain(plain_text(text)) if text else (None, None)


def _unify(text: str) -> str:
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)  # 1½ is 1 1/2, not 11/2
    for power, digit in (("²", "^2"), ("³", "^3")):
        text = text.replace(power, digit)
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/")
    return " ".join(re.sub("[\u2010-\u2015\u2212]", "-", text).split())


def _unwrap(text: str) -> str:
    """Remove box, announcement, delimiters and final full stop."""
    before = None
    while text != before:
        before = text
        text = boxed(text)
        for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**")):
            inner = text[len(left) : -len(right)]
            if text.startswith(left) and text.endswith(right) and inner and left not in inner:
                text = inner.strip()
        text = re.sub(r"(?<=\S)[.;!]$", "", text).strip().strip('"')
        text = _LEAD.sub("", text, count=1).strip() or text
    return text


def _parse_plain(text: str, depth: int = 0) -> tuple[str, str | None]:
    choice = _choice(text)
    if choice is not None:
        return choice, None
    assigned = _ASSIGNMENT.fullmatch(text)
    text = (assigned[1] if assigned else text).strip()
    quantity = _quantity(text)
    if quantity is not None:
        return quantity
    return (_list(text, depth + 1) if depth < _DEEPEST_LIST else None) or _words(text), None


def _choice(text: str) -> str | None:
    if match := _CHOICE.fullmatch(text):
        return match[1].upper()
    if _CHOICES.fullmatch(text):
        return ",".join(sorted(set(re.findall("[A-H]", text))))
    if match := _CHOICE_AND_TEXT.fullmatch(text):
        return match[1] or match[2]
    return None


def _quantity(text: str) -> tuple[str, str | None] | None:
    """Return exact value and unit of a number, the unit None if missing; None for other text."""
    if text[:1] == "(" and text[-1:] == ")" and "," not in text and _spans(text):
        text = text[1:-1].strip()
    match = _NUMBER.fullmatch(text)
    if match is None or match.start("rest") > _LONGEST_NUMBER:
        return None
    value = _value(match)
    if value is None:
        return None
    rest = match["rest"]
    scale = re.match(rf"\s+({'|'.join(_SCALES)})\b", rest, re.IGNORECASE)
    if scale:
        value, rest = value * _SCALES[scale[1].lower()], rest[scale.end() :]
    unit: str | None = UNIT_SYMBOLS[match["currency"]] if match["currency"] else None
    if rest.strip():
        if unit is not None:
            return None
        unit = unit_of(rest)
        if unit is None:
            return None
    return str(-value if match["sign"] == "-" else value), unit


def _value(match: re.Match[str]) -> Fraction | None:
    digits = {name: (match[name] or "").replace(",", "") for name in ("mixed", "plain", "top")}
    if digits["mixed"]:
        below = int(match["below"])
        return Fraction(digits["mixed"]) + Fraction(int(match["above"]), below) if below else None
    if digits["top"]:
        divisor = Fraction(match["bottom"].replace(",", ""))
        return Fraction(digits["top"]) / divisor if divisor else None
    exponent = int(re.findall(r"[-+]?\d+", match["power"])[-1]) if match["power"] else 0
    if abs(exponent) > _LONGEST_NUMBER:
        return None
    return Fraction(digits["plain"]) * Fraction(10) ** exponent


def _list(text: str, depth: int) -> str | None:
    """Return the canonical form of a list in brackets or of numbers alone, by elements."""
    left, right = "", ""
    if text[:1] in _BRACKETS and text[-1:] in _BRACKETS.values() and _spans(text):
        left, right, text = text[0], text[-1], text[1:-1]
    parts = [part.strip() for part in _split(text)]
    if len(parts) < 2 or not all(parts):
        return None
    if not left and not all(_quantity(part) for part in parts):
        return None
    elements = [_join(*_parse_plain(part, depth)) for part in parts]
    if left == "{":
        elements.sort()
    return left + ", ".join(elements) + right


def _spans(text: str) -> bool:
    """Return whether the last character closes the first bracket, of any kind: (1, 2]."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character in _BRACKETS) - (character in _BRACKETS.values())
        if not depth:
            return index == len(text) - 1
    return False


def _split(text: str) -> list[str]:
    """Split at commas (and "and") outside brackets."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(r"[(\[{]|[)\]}]|,\s*and\b|,|\band\b", text):
        if match[0] in _BRACKETS:
            depth += 1
        elif match[0] in _BRACKETS.values():
            depth -= 1
        elif not depth:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]


def _join(value: str, unit: str | None) -> str:
    return value if unit is None else f"{value} {unit}"


def _words(text: str) -> str:
    return _OPERATORS.sub(r"\1", " ".join(text.split())).casefold()
