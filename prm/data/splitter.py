"""Split free-form solutions into steps, without losing a character.

A text is cut before lines that start a step: "Step 3:", items of a numbered list that counts up
from 1, paragraphs after a blank line, "Answer: ...". Numbers inside prose are never taken for
items: neither "x = 4. Then" nor "3.5" nor a line "3. 5 apples" that continues no list. (The
splitter of DreamPRM-1.5 removes every number in prose that is followed by a full stop or a bracket:
"So x = 4. Then y = 5." becomes "So x =", "Then y =".)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_HEAD = r"[ \t]*(?:#{1,6}[ \t]*)?\*{0,2}"
_STEP = re.compile(_HEAD + r"(?:step|步骤)[ \t]*(\d{1,3})\b", re.IGNORECASE)
_INLINE_STEP = re.compile(r"(?:^|(?<=\s))\*{0,2}(?:step|步骤)[ \t]*(\d{1,3})\*{0,2}[:：]", re.I)
_ITEM = re.compile(r" {0,3}\*{0,2}(\d{1,3})(?:[.)](?=[\s*])|、)")
# The quantifiers are possessive, so that a long run of white space is matched in linear time.
_GAP = r"[ \t]*+(?:\*{1,2}+[ \t]*+)?"
_ANSWER = re.compile(_HEAD + rf"(?:(?:final[ \t]+)?answer|答案){_GAP}[:：]", re.I)
_TAG = re.compile(r"\s*\[reasoning\][ \t]*\n?", re.IGNORECASE)
_FENCE = re.compile(r"[ \t]*(?:```|~~~)")
_CONTINUES = re.compile(r"[ \t]|[-*+•][ \t]")


@dataclass(frozen=True)
class _Line:
    """One line of a text: its start, its text, and whether a fence makes it code."""

    start: int
    text: str
    code: bool


def split_steps(text: str) -> list[str]:
    """Cut a solution into steps whose concatenation is the text, character for character.

    The text is cut in the first of these ways that applies:

    1. before every "Step k", if at least two lines count up like this, or at least two positions
       in one line with a colon after k; paragraphs before the first are steps, too;
    2. before every item of a numbered list of at least two items that starts at 1, and before the
       paragraphs in front of the list and after it;
    3. before every paragraph that follows a blank line.

    An answer line ("Answer: ...", "Final answer: ...") starts a step in each case. Code between
    fences stays whole. No step is blank unless the text is: white space ends the step before it,
    and a leading "[Reasoning]" belongs to the first step. An empty text has no steps.
    """
    lines = _lines(text)
    marks = _counting(((_STEP.match(line.text), line.start) for line in lines), first=None)
    if len(marks) < 2:
        matches = ((match, match.start()) for match in _INLINE_STEP.finditer(text))
        marks = _counting(matches, first=None)
    if len(marks) >= 2:
        cuts = {*marks, *_paragraphs(lines, until=marks[0])}
    else:
        open_lines = [line for line in lines if not line.code]
        items = _counting(((_ITEM.match(line.text), line.start) for line in open_lines), first=1)
        if len(items) >= 2:
            cuts = {*items, *_paragraphs(lines, until=items[0])}
            behind = [line for line in lines if line.start > items[-1]]
            cuts |= {cut for cut in _paragraphs(behind) if not _CONTINUES.match(text, cut)}
        else:
            cuts = set(_paragraphs(lines))
    cuts |= {line.start for line in lines if not line.code and _ANSWER.match(line.text)}
    return _cut(text, sorted(cuts))


def solution_steps(text: str) -> list[str]:
    """Split ``text`` into steps without the "[Reasoning]" tag and without outer white space."""
    tag = _TAG.match(text)
    body = text[tag.end() :] if tag else text
    return [step for piece in split_steps(body) if (step := piece.strip())]


def _lines(text: str) -> list[_Line]:
    lines, start, code = [], 0, False
    for part in text.split("\n"):
        fence = bool(_FENCE.match(part))
        lines.append(_Line(start, part, code))
        code ^= fence
        start += len(part) + 1
    return lines


def _counting(matches: Iterable[tuple[re.Match[str] | None, int]], first: int | None) -> list[int]:
    """Return the starts of matches that count up by one, from ``first`` or from any number."""
    starts: list[int] = []
    wanted = first
    for match, start in matches:
        if match is not None and wanted in (None, int(match[1])):
            starts.append(start)
            wanted = int(match[1]) + 1
    return starts


def _paragraphs(lines: Sequence[_Line], until: int | None = None) -> list[int]:
    """Return the starts of the lines that follow a blank line, up to ``until``."""
    starts = []
    blank = False
    for line in lines:
        if until is not None and line.start >= until:
            break
        if line.text.strip() and blank and not line.code:
            starts.append(line.start)
        blank = not line.text.strip() and not line.code
    return starts


def _cut(text: str, cuts: Sequence[int]) -> list[str]:
    steps: list[str] = []
    held = ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        held += text[start:end]
        # White space or the tag alone belongs to the next step.
        tag = _TAG.match(held)
        if held[tag.end() if tag else 0 :].strip():
            steps.append(held)
            held = ""
    if held and steps:
        steps[-1] += held
    elif held:
        steps.append(held)
    return steps
