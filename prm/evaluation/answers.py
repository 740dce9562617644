r"""Canonical forms of final answers: equal answers become equal strings, which can be voted on.

``canonical_answer`` applies these rules, in this order:

1. Blank: no answer. Unicode forms are unified (NFKC; minus signs and dashes are "-", "½" is "1/2").
2. The last ``\boxed{...}`` stands for the whole; "the answer is", "Answer:" and "Option" in front
   are removed, as are delimiters of mathematics ("$28$ percent" too), quotes, emphasis, a final
   full stop and sentences behind the answer.
3. LaTeX becomes plain text by the rules of ``prm.evaluation.latex``: ``\frac{a}{b}`` is a/b,
   ``\text{x}`` x, ``\pi`` π, ``\leq`` ≤.
4. Choices by the rules of ``prm.evaluation.choices``: "(b)", "B) 12 cm", "B - 12 cm" are "B";
   "A and C" and "AC" are "A,C"; "A. 5, C. 7" is neither.
5. What is in front of "=" or "∈" is removed if it is a name: "x = 5", "f(x) = 5", "(p,q) = (3,2)",
   "x ∈ [2,5)". Several: "y=2, x=1" is "x=1, y=2".
6. Numbers are exact: "3.50", "7/2", "3 1/2", "35e-1" are "7/2"; "1,234" is "1234"; "2 million" is
   "2000000"; "2^10" is "1024". Nothing is rounded: "0.33" is not "1/3".
7. Units behind a number, known ones by their symbol: "12 centimetres" is "12 cm", "$3" is "3 $",
   "50 percent" is "50 %", "5 m per s" is "5 m/s". A single-letter unit needs a space ("5m" may be
   5·m). Other words of three letters or more are a unit too: "3 apples" is "3 apple". Units are
   never converted. A quotation mark behind a number (5") is no unit, and stays.
8. Lists in brackets, or of numbers, element by element: "(1.0,2)" is "(1, 2)"; sets {...} in
   sorted order. So are matrices, and unions of intervals.
9. Anything else: lower case where case has no meaning by ``prm.evaluation.letter_case`` ("Cat" is
   "cat", CO is not Co), no space where it has none ("4 π" is "4π"), no sign of multiplication
   before a letter, "x > 3" as "3<x". The sign × between letters alone is kept: it may be a cross
   product.

An answer of more than 2000 characters, and any part that is nested more than 20 brackets deep, is
compared as text, by rule 9.

A number without a unit and the same number with one are different answers. ``answer_classes``
considers all candidates of a question and merges the two where the unit is unambiguous.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction

from prm.evaluation.brackets import OPENING, spans, split_outside
from prm.evaluation.choices import choice
from prm.evaluation.final_answer import TAGS, without_remarks
from prm.evaluation.latex import DOUBLE_STRUCK, FUNCTIONS, last_box, plain_text
from prm.evaluation.letter_case import is_without_case, without_case
from prm.evaluation.units import UNIT_SYMBOLS, unit_of

SameAnswer = Callable[[str, str], bool]
"""Whether two answers, as they were given, are the same."""
_LONGEST_NUMBER = 300
"""The number of characters, or the exponent, beyond which a number is treated as text."""
_LONGEST_ANSWER = 2_000
_DEEPEST_LIST = 20
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_LEAD = re.compile(
    r"^(?:(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:final\s+|correct\s+|right\s+|best\s+)?"
    r"(?:(?:answer|ans|result|option|choice)s?\s*(?:(?:is|are)\b\s*:?|:|=)|(?:option|choice)s?\s*:?)"
    r"|(?:故|所以|因此)?(?:应|应该)?选(?:项|择)?:?(?=\s*[(\[]?[A-J](?![A-Za-z])))\s*",
    re.IGNORECASE,
)
_DELIMITERS = (
    *(("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")),
    *TAGS,
    *(("**", "**"), ("*", "*"), ("__", "__"), ("`", "`"), ('"', '"'), ("“", "”"), ("'", "'")),
)
_INLINE = re.compile(
    r"(?<!\\)\$(?=\S)([^$]*[^\s$\\])\$(?!\d)|(?<!\\)\$\s*(?=[-+\d])([^$A-Za-z]*\d)\s*\$(?!\d)|\\\((.*?)\\\)"
)
"""Mathematics within a text; "$3 and $5" are amounts of money, by the spaces."""
_STRUCK = re.compile(f"[{''.join(DOUBLE_STRUCK.values())}]")
_OPTION_IN_BOLD = re.compile(r"\*\*([(\[]?[A-J][)\]]?[.:]?)\*\*")
_SUPERSCRIPT = re.compile(r"(?<=[^\s¹²³⁰-⁹])[¹²³⁰-⁹⁺⁻ⁿⁱˣʸ]+(?![¹²³⁰-⁹⁺⁻ⁿⁱˣʸ⁄])")
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+(?!\d| *\d*/)|\d+)"
_PLAIN = rf"(?:{_WHOLE}(?:\.\d*)?|\.\d+)"
_POWER = r"(?:[eE][-+]?\d+|\s*(?:\*|x|×)\s*10\^\(?[-+]?\d+\)?)"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<currency>[$€£¥]?)\s*(?:"
    rf"(?P<base>\d+)\^\(?(?P<exponent>[-+]?\d+)\)?"
    rf"|(?P<mixed>{_WHOLE})\s+(?P<above>\d+)\s*/\s*(?P<below>\d+)"
    rf"|(?P<top>{_PLAIN})\s*/\s*(?P<bottom>-?{_PLAIN})"
    rf"|(?P<plain>{_PLAIN})(?P<power>{_POWER})?)(?P<rest>.*)",
    re.DOTALL,
)
_NAME = r"(?:∠?\s*[A-Z]{2,3}|[^\W\d_](?:_(?:\w+|\([^()]*\)))?'*)"
_ASSIGNMENT = re.compile(
    rf"({_NAME})(?:\([^()=]*\))?\s*(?:=|∈\s*(?=[(\[{{]))\s*([^=<>≤≥≠∈]+)"
    rf"|(\(\s*{_NAME}(?:\s*,\s*{_NAME})+\s*\))\s*=\s*(\([^=<>≤≥≠∈]+\))"
)
_ROUNDED = re.compile(
    r"(?:(?:approximately|approx\.?|about|roughly|around|circa|大约|约)\s*|(?:(?-i:[A-Za-df-hj-z])\s*)?≈\s*)"
    r"(?P<behind>\S.*)|(?P<before>.*\S)\s*\((?:approximately|approx\.?|rounded[^()]*)\)",
    re.IGNORECASE,
)
_GOES_ON = re.compile(r"(?:[,;]\s*|\d\.\d+\s*)\.{3}$")
"""A list or a decimal that does not end: 1, 2, 3, ... is not 1, 2, 3, nor 0.333... 0.333."""
_DAYTIME = re.compile(r"(?<=\d)\s*([ap])\.\s?m\b\.?", re.IGNORECASE)
_OPERATORS = re.compile(r"\s*([-+*×/^=<>(),|:;≤≥≠∈∪∩±!'{}\[\]])\s*")
_TOKEN = re.compile(r"\d+(?:\.\d+)?|[Ͱ-Ͽ]|[^\W\d_Ͱ-Ͽ]+|\S")
_SEPARATORS = r",\s*(?:and|or)\b|,|;|\band\b|\bor\b"
_NUMERIC = r"(?:(?<![\d.])\d[\d.]*+[°%]?|π|(?:sqrt|root)?\([-+*/.,\dπ]+\))"
_TIMES = re.compile(
    rf"(?:(?P<index>_?)(?P<left>{_NUMERIC}))?×(?:[^\W\d_]+×)*+(?=(?P<right>[-+]?(?:{_NUMERIC}|\.\d))?)"
)
"""The signs × of a product, and numbers at its ends. Without one it may be a cross product."""
_PRODUCT = re.compile(r"(?<=[^\W_)])\*(?=[^\W\d_(])")


def canonical_answer(text: str | None) -> str | None:
    """Return the canonical form of an answer by the rules of this module; None for a blank one."""
    value, unit = answer_parts(text)
    return value if value is None else _join(value, unit)


def answer_classes(
    answers: Sequence[str | None], same: SameAnswer | None = None
) -> list[str | None]:
    """Return canonical answers of one question, with a missing unit filled in if unambiguous.

    "12" counts as "12 cm" if every candidate that gives 12 with a unit gives cm. If they give
    several units, or none, it remains an answer of its own. Likewise "x = 5" and "y = 5", which may
    be two lines, are two where candidates give both, and "5" is a third; where they give one of
    them, its name does not count.

    Args:
        answers: The answer of each candidate. None means that it has no answer.
        same: A second opinion on two answers of different form, such as
            ``prm.evaluation.second_opinion.load_math_verify()``. Answers are joined if it finds
            each the same as every other.

    Returns:
        A string per candidate, equal for those that agree, or None for a candidate without a vote.
    """
    parsed = [answer_parts(answer) for answer in answers]
    units: dict[str, set[str]] = {}
    for value, unit in parsed:
        if value is not None and unit is not None:
            units.setdefault(value, set()).add(unit)
    axes = [_axis(answer) for answer in answers]
    named: dict[tuple[str | None, str | None], set[str]] = {}
    for parts, axis in zip(parsed, axes, strict=True):
        if axis is not None:
            named.setdefault(parts, set()).add(axis)
    classes: list[str | None] = []
    as_given: dict[str, str] = {}
    for answer, (value, unit), axis in zip(answers, parsed, axes, strict=True):
        if value is None or answer is None:
            classes.append(None)
            continue
        if axis is not None and len(named[value, unit]) > 1:
            value = f"{axis}={value}"
        own = _join(value, unit)
        if unit is None and len(units.get(value, ())) == 1:
            (unit,) = units[value]
        classes.append(_join(value, unit))
        if own == classes[-1]:
            as_given.setdefault(own, answer)
    if same is None:
        return classes
    names = _joined(as_given, same)
    return [None if name is None else names[name] for name in classes]


def _axis(answer: str | None) -> str | None:
    """Return the coordinate that an answer gives the value of: y for "y = 5"."""
    if answer is None or not re.search("=|≈|approx", answer) or len(answer) > _LONGEST_ANSWER:
        return None
    match = re.match(r"([xyz])\s*[=≈]", plain_text(unwrapped(_unify(answer))))
    return None if match is None else match[1]


def _joined(as_given: dict[str, str], same: SameAnswer) -> dict[str, str]:
    """Return the class that each class joins: the first of those that are all the same."""
    joined: list[list[str]] = []
    for name, answer in as_given.items():
        for others in joined:
            if all(same(as_given[other], answer) for other in others):
                others.append(name)
                break
        else:
            joined.append([name])
    return {name: names[0] for names in joined for name in names}


def answer_parts(text: str | None) -> tuple[str | None, str | None]:
    """Return the canonical value and its unit, None if missing; only a number can have a unit."""
    if text is None or not text.strip():
        return None, None
    text = _unify(text)
    if len(text) > _LONGEST_ANSWER:
        return _words(text), None
    text = unwrapped(text)
    if not text:
        return None, None
    plain = re.sub(r"^-\s*-(?=\d)", "", plain_text(text))
    plain = _DAYTIME.sub(lambda m: f"{m[1]}m", plain)
    return _parse_plain(re.sub(r"(?<=[^\W_])\s*\.$", "", plain) or plain)


def _unify(text: str) -> str:
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞]|[¹²³⁰-⁹]+⁄)", " ", text)  # 1½ is 1 1/2, not 11/2
    text = re.sub(r"(?<=[₀-₉])(?=\d)", " ", text)
    text = _SUPERSCRIPT.sub(lambda m: f"^{{{unicodedata.normalize('NFKC', m[0])}}}", text)
    text = _STRUCK.sub(lambda m: rf"\mathbb{{{unicodedata.normalize('NFKC', m[0])}}}", text)
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/")
    return " ".join(re.sub("[\u2010-\u2015\u2212]", "-", text).split())


def unwrapped(text: str) -> str:
    """Return an answer without box, announcement, delimiters, remarks and final full stop."""
    before = None
    while text != before:
        before = text
        box = last_box(text)
        text = text if box is None else box[2]
        for left, right in _DELIMITERS:
            inner = text[len(left) : -len(right)]
            if text.startswith(left) and text.endswith(right) and inner and left not in inner:
                text = inner.strip()
        text = without_remarks(text).strip()
        if not _GOES_ON.search(text):
            text = re.sub(r"(?<=\S)(?<![.;,\\])[.;,。．]+$|(?<=[^\W\d_]{3})!$", "", text).strip()
        text = _without_a_quote(text)
        text = _LEAD.sub("", text, count=1).strip() or text
        text = re.sub(r"^=\s*(?=\S)", "", text)
        text = _INLINE.sub(lambda m: m[1] or m[2] or m[3] or "", text)
        text = _OPTION_IN_BOLD.sub(r"\1", text)
    return text


def _without_a_quote(text: str) -> str:
    """Remove a quotation mark without its partner; behind a number it means inches or seconds."""
    if text.count('"') != 1 or re.search(r'[\d}]"$', text):
        return text
    return text.strip('"') or text


def _parse_plain(text: str, depth: int = 0) -> tuple[str, str | None]:
    letters = None if depth else choice(text)  # The letters of (a, b) are names.
    if letters is not None:
        return letters, None
    if depth < _DEEPEST_LIST and (several := _assignments(text, depth + 1)) is not None:
        return several, None
    if (assigned := _ASSIGNMENT.fullmatch(text)) and _in_order(assigned[3]):
        text = (assigned[2] or assigned[4]).strip()
        if not depth and (letters := choice(text)) is not None:
            return letters, None
    rounded = _ROUNDED.fullmatch(text)
    quantity = _quantity((rounded["behind"] or rounded["before"]) if rounded else text)
    if quantity is not None:
        return quantity
    if re.fullmatch(r"(?:the )?(?:empty|null) set", text, re.IGNORECASE):
        return "∅", None
    return (_list(text, depth + 1) if depth < _DEEPEST_LIST else None) or _words(text), None


def _in_order(names: str | None) -> bool:
    """Return whether names in brackets have the order in which they may be left out.

    It is that of the alphabet, and (ρ, θ, φ): (y,x) = (2,3) is not (2, 3).
    """
    given = re.findall(_NAME, names or "")
    return given == sorted(given, key=lambda name: (name != "ρ", name))


def _quantity(text: str) -> tuple[str, str | None] | None:
    """Return exact value and unit of a number, the unit None if missing; None for other text."""
    if text[:1] == "(" and text[-1:] == ")" and "," not in text and spans(text):
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
    digits = {
        name: re.sub("[, ]", "", match[name] or "") for name in ("mixed", "plain", "top", "bottom")
    }
    if match["base"]:
        return _power(int(match["base"]), int(match["exponent"]))
    if digits["mixed"]:
        below = int(match["below"])
        return Fraction(digits["mixed"]) + Fraction(int(match["above"]), below) if below else None
    if digits["top"]:
        divisor = Fraction(digits["bottom"])
        return Fraction(digits["top"]) / divisor if divisor else None
    exponent = int(re.findall(r"[-+]?\d+", match["power"])[-1]) if match["power"] else 0
    if abs(exponent) > _LONGEST_NUMBER:
        return None
    return Fraction(digits["plain"]) * Fraction(10) ** exponent


def _power(base: int, exponent: int) -> Fraction | None:
    """Return an integer power, None for one of too many digits or of 0 below a fraction."""
    if abs(exponent) * max(1, len(str(base))) > _LONGEST_NUMBER or (not base and exponent <= 0):
        return None
    return Fraction(base) ** exponent


def _list(text: str, depth: int) -> str | None:
    """Return the canonical form of a list in brackets or of numbers alone, by elements.

    A matrix is a list of rows, a union of intervals one without order.
    """
    matrix = re.match(r"(matrix|determinant|norm|array)(?=\()", text)
    if matrix and spans(text[matrix.end() :]):
        rows = [
            ", ".join(_join(*_parse_plain(cell, depth)) for cell in split_outside(row, ","))
            for row in split_outside(text[matrix.end() + 1 : -1], ";")
        ]
        return f"{matrix[1]}({'; '.join(rows)})"
    sets = split_outside(text, "∪")
    if len(sets) > 1 and all(sets):
        return "∪".join(sorted(_join(*_parse_plain(part, depth)) for part in sets))
    left, right = "", ""
    if text[:1] in OPENING and spans(text):
        left, right, text = text[0], text[-1], text[1:-1]
    if left == "{" and not text.strip():
        return "∅"
    parts = split_outside(text, _SEPARATORS)
    if len(parts) < 2 or not all(parts):
        return None
    if not left and not all(_is_number(part) for part in parts):
        return None
    elements = [_join(*_parse_plain(part, depth)) for part in parts]
    if left == "{":
        elements.sort()
    return left + ", ".join(elements) + right


def _is_number(text: str) -> bool:
    """Return whether a text is a quantity, or a formula with a digit and no word or choice."""
    if _quantity(text):
        return True
    words = {token for token in _TOKEN.findall(text) if token.isalpha() and len(token) > 1}
    return bool(re.search(r"\d", text)) and words <= FUNCTIONS and not re.search("[<>≤≥≠=∈]", text)


def _assignments(text: str, depth: int) -> str | None:
    """Return the values of several names, "x=1, y=2", or all values of one name, "1, 2"."""
    parts = split_outside(text, _SEPARATORS)
    found = [_ASSIGNMENT.fullmatch(part) for part in parts]
    given = [
        (match[1], _join(*_parse_plain(match[2].strip(), depth)))
        for match in found
        if match and match[1]
    ]
    if len(parts) < 2 or len(given) < len(parts):
        return None
    names = {name for name, _ in given}
    if len(names) == 1:
        return ", ".join(value for _, value in given)
    if len(names) < len(given):
        return None
    return ", ".join(f"{name}={value}" for name, value in sorted(given))


def _join(value: str, unit: str | None) -> str:
    return value if unit is None else f"{value} {unit}"


def _words(text: str) -> str:
    """Return a text without spaces, case and signs of multiplication that make no difference."""
    text = _OPERATORS.sub(r"\1", " ".join(text.split()))
    text = text.casefold() if is_without_case(text) else _TIMES.sub(_of_number, text)
    pieces = []
    end = 0
    last = ""
    for match in _TOKEN.finditer(text):
        if match.start() > end and _apart(last, match[0]):
            pieces.append(" ")
        last, end = match[0], match.end()
        pieces.append(without_case(last, text[end : end + 40]) if last.isalpha() else last)
    text = "".join(pieces)
    product = _PRODUCT.sub("", text)
    text = product if choice(product) is None else text  # A*B is not the choice AB.
    if re.search("[>≥]", text) and not re.search(r"[<≤,;]|\bor\b|\band\b", text):
        text = re.sub("[>≥]", lambda m: "<" if m[0] == ">" else "≤", "".join(_reversed(text)))
    return text


def _of_number(match: re.Match[str]) -> str:
    """Write × in a product with a number as "*"; digits of an index, as in Z_2×Z, are none."""
    has_number = match["right"] or (match["left"] and not match["index"])
    return match[0].replace("×", "*") if has_number else match[0]


def _apart(left: str, right: str) -> bool:
    """Return whether a space between two tokens has a meaning: between numbers, and at words."""
    if not (left.isalnum() or left[-1:].isdigit()) or not right.isalnum():
        return False
    if left[-1].isdigit() and right[0].isdigit():
        return True
    words = [token for token in (left, right) if token.isalpha() and token not in FUNCTIONS]
    return any(len(word) > 2 for word in words) or (
        left.isalpha() and right.isalpha() and any(len(word) > 1 for word in words)
    )


def _reversed(text: str) -> list[str]:
    """Return the sides of "a>b≥c" and the signs between them from right to left."""
    return re.split("([>≥])", text)[::-1]
