"""Split free-form solutions into steps, without losing a character.

A text is cut before lines that start a step: "Step 3:" (in one of many languages), items of a
numbered list that counts up from 1, paragraphs after a blank line, "Answer: ...", or every line of
a text that has one step a line. Numbers inside prose are never taken for items: neither "x = 4.
Then" nor "3.5" nor a line "3. 5 apples" that continues no list. (The splitter of DreamPRM-1.5
removes every number in prose that is followed by a full stop or a bracket: "So x = 4. Then y = 5."
becomes "So x =", "Then y =".)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_HEAD = r"[ \t]*(?:#{1,6}[ \t]*)?\*{0,2}"
_WORDS = (
    "step|schritt|étape|e\u0301tape|etape|paso|passo|etapa|stap|steg|trin|vaihe|krok|lépés|adım|"
    "шаг|крок|βήμα|bước|langkah|चरण|ขั้นตอนที่|ขั้นตอน|الخطوة|خطوة|步骤|步驟|ステップ|手順|단계"
)
_NUMBER = r"(?:\d{1,3}|[一二三四五六七八九十]{1,3})"
# The quantifiers are possessive, so that a long run of white space is matched in linear time.
_NUMBERED = (
    rf"(?:(?:{_WORDS})[ \t]*+(?:#|№|n[°º]|no\.|:)?[ \t]*+(?P<after>{_NUMBER})\b"
    rf"|第[ \t]*(?P<between>{_NUMBER})[ \t]*步|(?P<before>\d{{1,3}})[ \t]*단계)"
)
_STEP = re.compile(rf"{_HEAD}[\[(（【]?{_NUMBERED}", re.IGNORECASE)
_HEADING = re.compile(r"[ \t]*+(?:\*\*|[\])】）:：。，—–]|[.-](?!\d)|\s*$)")
_INLINE_STEP = re.compile(
    rf"(?:^|(?<=[\s。；！？]))\*{{0,2}}{_NUMBERED}\*{{0,2}}[ \t]*[:：]", re.IGNORECASE
)
_NAMED_STEP = re.compile(rf"(?<!\w)\*{{0,2}}{_NUMBERED}\*{{0,2}}[ \t]*[:：]", re.IGNORECASE)
_ITEM = re.compile(r"( {0,3})\*{0,2}(\d{1,3})(?:[.)](?=[\s*])|、)")
_NESTED = 2
"""An item that is indented by so many spaces more than the list belongs to the item above it."""
_GAP = r"[ \t]*+(?:\*{1,2}+[ \t]*+)?"
_ANSWER = re.compile(_HEAD + rf"(?:(?:final[ \t]+)?answer|答案){_GAP}[:：]", re.I)
_TAG = re.compile(r"\s*\[reasoning\][ \t]*\n?", re.IGNORECASE)
_QUOTE = re.compile(r" {0,3}(?:>[ \t]?)+")
_BLANK = " \t\r\n\f\v>"
"""What a step may not consist of alone: white space and marks of a quotation."""
_FENCE = re.compile(r"[ \t]*(?:```|~~~)")
_CONTINUES = re.compile(r"[ \t]|[-*+•][ \t]")
_CHINESE = {digit: value for value, digit in enumerate("一二三四五六七八九", start=1)}
_SENTENCE_END = re.compile(r"[.!?。！？;；…][\"'”’)\]]*$")
_GOES_ON = re.compile(
    r"(?:[,，、(\[{=≤≥×÷]|\s[+*/-]|\b(?:an|and|are|as|at|by|equals|for|from|is|of|or|than|that|the|to|"
    r"was|were|when|where|which|with))$"
)
_WORD = re.compile(r"[^\W\d_]{2}")
_ATTACHED = re.compile(r"[ \t]|[-*+•|][ \t]|[=)\]}&]|```|~~~")
_DISPLAY = re.compile(r"(?<!\\)(?:\\[\[\]]|\$\$|\\(?:begin|end)\b)")
_FORMULA = re.compile(
    r"(?<!\\)(?:\\[\[\]]|\$\$|\\(?:begin|end)\{(?:equation|align|alignat|aligned|array|cases|"
    r"displaymath|eqnarray|flalign|gather|gathered|math|multline|smallmatrix|split|tabular|"
    r"[pbBvV]?matrix)\*?\})"
)
_OPENS = re.compile(r"\s*+(?:\\\[|\$\$|\\begin\{)|.*(?:\\\[|\$\$|\\begin\{\w+\*?\})\s*$")
"""A line that a displayed formula starts or ends: of "A costs $$5" the signs are money."""


@dataclass(frozen=True)
class _Line:
    """One line of a text.

    Attributes:
        start: Where it starts.
        text: The line itself, without the marks of a quotation (">") in front of it.
        inside: Whether it goes on with code between fences, or with a displayed formula.
    """

    start: int
    text: str
    inside: bool


def split_steps(text: str) -> list[str]:
    """Cut a solution into steps whose concatenation is the text, character for character.

    The text is cut in the first of these ways that applies:

    1. before every line with a heading "Step k:", whatever the numbers, and every line with a
       "Step k" that counts up, if there are at least two; or at least two positions in one line
       with a colon after k that count up; paragraphs before the first are steps, too;
    2. before every item of a numbered list of at least two items that starts at 1, and before the
       paragraphs in front of the list and after it; a nested list belongs to its item;
    3. before every paragraph that follows a blank line;
    4. before every line, if no line looks like the continuation of the one above it.

    "Step" may be the word of another language ("Schritt 1", "第1步"). An answer line ("Answer:",
    "Final answer:") starts a step in each case. Code between fences and displayed formulas
    stay whole. No step is blank unless the text is: white space ends the step before it, and a
    leading "[Reasoning]" belongs to the first step. An empty text has no steps.
    """
    lines = _lines(text)
    marks = _headings(lines) or _inline(text)
    if marks:
        cuts = {*marks, *_paragraphs(lines, until=marks[0])}
    elif items := _items(lines):
        cuts = {*items, *_paragraphs(lines, until=items[0])}
        behind = [line for line in lines if line.start > items[-1]]
        cuts |= {cut for cut in _paragraphs(behind) if not _CONTINUES.match(text, cut)}
    else:
        cuts = set(_paragraphs(lines) or _single_lines(lines))
    cuts |= {line.start for line in lines if not line.inside and _ANSWER.match(line.text)}
    return _cut(text, sorted(cuts))


def last_first_step(text: str) -> int | None:
    """Return where the last "Step 1:" of a text starts, at a line start or inside a line."""
    starts = [match.start() for match in _NAMED_STEP.finditer(text) if _number(match) == 1]
    return starts[-1] if starts else None


def solution_steps(text: str) -> list[str]:
    """Split ``text`` into steps without the "[Reasoning]" tag and without outer white space."""
    tag = _TAG.match(text)
    body = text[tag.end() :] if tag else text
    return [step for piece in split_steps(body) if (step := piece.strip())]


def _lines(text: str) -> list[_Line]:
    lines, start, code = [], 0, False
    parts = text.split("\n")
    bare = [_QUOTE.sub("", part, count=1) if _QUOTE.match(part) else part for part in parts]
    formula = _in_formula(bare)
    for number, part in enumerate(bare):
        fence = bool(_FENCE.match(part))
        lines.append(_Line(start, part, code or number in formula))
        code ^= fence
        start += len(parts[number]) + 1
    return lines


def _in_formula(parts: Sequence[str]) -> set[int]:
    """Return which lines go on with a displayed formula that ends in one of them or later.

    A formula that is never closed ends with its own line, so that it does not hold the rest.
    """
    inside: set[int] = set()
    first = depth = 0
    for number, part in enumerate(parts):
        before, depth = depth, _depth(part, depth, _FORMULA)
        if not before:
            first = number + 1
            depth = depth if _OPENS.match(part) else 0
        elif not depth:
            inside.update(range(first, number + 1))
    return inside


def _headings(lines: Sequence[_Line]) -> list[int]:
    starts: list[int] = []
    wanted = None
    for line in lines:
        match = _STEP.match(line.text)
        if match is None:
            continue
        if wanted in (None, _number(match)) or _HEADING.match(line.text, match.end()):
            starts.append(line.start)
            wanted = _number(match) + 1
    return starts if len(starts) >= 2 else []


def _inline(text: str) -> list[int]:
    found = [(_number(match), match.start()) for match in _INLINE_STEP.finditer(text)]
    for gaps in (False, True):  # "as in Step 1:" and "before Step 5:" start no step
        starts, last = [], None
        for number, start in found:
            if last is None or number == last + 1 or (gaps and number > last):
                starts.append(start)
                last = number
        if len(starts) >= 2:
            return starts
    return []


def _number(match: re.Match[str]) -> int:
    digits = match["after"] or match["between"] or match["before"]
    if digits.isdecimal():
        return int(digits)
    tens, ten, ones = digits.rpartition("十")
    return 10 * (_CHINESE.get(tens, 1) if ten else 0) + _CHINESE.get(ones, 0)


def _items(lines: Sequence[_Line]) -> list[int]:
    starts: list[int] = []
    margin = 0
    for line in lines:
        match = None if line.inside else _ITEM.match(line.text)
        if match is None or int(match[2]) != len(starts) + 1:
            continue
        if not starts:
            margin = len(match[1])
        if len(match[1]) < margin + _NESTED:
            starts.append(line.start)
    return starts if len(starts) >= 2 else []


def _paragraphs(lines: Sequence[_Line], until: int | None = None) -> list[int]:
    """Return the starts of the lines that follow a blank line, up to ``until``."""
    starts = []
    blank = False
    for line in lines:
        if until is not None and line.start >= until:
            break
        if line.text.strip() and blank and not line.inside:
            starts.append(line.start)
        blank = not line.text.strip() and not line.inside
    return starts


def _single_lines(lines: Sequence[_Line]) -> list[int]:
    """Return the starts of the lines of a text without blank lines that has one step a line.

    There are none if a line goes on in the next, as lines of prose do that an editor broke.
    """
    starts = []
    depth = 0
    for above, line in pairwise(lines):
        depth = _depth(above.text, depth)
        before, after = above.text.rstrip(), line.text.rstrip()
        ended = bool(_SENTENCE_END.search(before))
        attached = before.endswith((":", "：")) or _ATTACHED.match(after)
        formula = depth > 0 or (not ended and _DISPLAY.match(after))
        if not before or not after or line.inside or attached or formula:
            continue
        if _GOES_ON.search(before) or (not ended and _WORD.match(after) and after[0].islower()):
            return []
        starts.append(line.start)
    return starts


def _depth(text: str, depth: int, signs: re.Pattern[str] = _DISPLAY) -> int:
    """Return how many displayed formulas are open behind ``text``."""
    for sign in signs.findall(text):
        closes = sign.startswith(("\\]", "\\end")) or (sign == "$$" and depth > 0)
        depth = max(0, depth - 1) if closes else depth + 1
    return depth


def _cut(text: str, cuts: Sequence[int]) -> list[str]:
    steps: list[str] = []
    held = ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        held += text[start:end]
        # White space or the tag alone belongs to the next step.
        tag = _TAG.match(held)
        if held[tag.end() if tag else 0 :].strip(_BLANK).strip():
            steps.append(held)
            held = ""
    if held and steps:
        steps[-1] += held
    elif held:
        steps.append(held)
    return steps
