"""Free-form solutions to steps, without losing a character.

A text is cut in front of lines that start a step: "Step 3:", items of a numbered list that counts
up from 1, paragraphs behind a blank line, "Answer: ...". Numbers inside prose are never taken for
items: neither "x = 4. Then" nor "3.5" nor a line "3. 5 apples" that continues no list. (The
splitter of DreamPRM-1.5 removes every number in prose that a full stop or a bracket follows:
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
# Possessive: a long run of white space is gone through once, not once per way to divide it.
_GAP = r"[ \t]*+(?:\*{1,2}+[ \t]*+)?"
_ANSWER = re.compile(_HEAD + rf"(?:(?:final[ \t]+)?answer|答案){_GAP}[:：]", re.I)
_STATED = re.compile(rf"(?:\banswer|答案){_GAP}(?:[:：]|is\b[:：]?|是[:：]?)", re.I)
_TAG = re.compile(r"\s*\[reasoning\][ \t]*\n?", re.IGNORECASE)
_FENCE = re.compile(r"[ \t]*(?:```|~~~)")
_CONTINUES = re.compile(r"[ \t]|[-*+•][ \t]")


@dataclass(frozen=True)
class _Line:
    """One line of a text: where it starts, what it says, whether a fence makes it code."""

    start: int
    text: str
    code: bool


def split_steps(text: str) -> list[str]:
    """Cut a solution into steps whose concatenation is the text, character for character.

    The cuts lie, in this order of preference:

    1. in front of "Step k", where at least two lines, or places in one line with a colon behind k,
       count up so; paragraphs before the first are steps, too;
    2. in front of the items of a numbered list of at least two items from 1 on, and of the
       paragraphs before it and behind it;
    3. in front of every paragraph behind a blank line.

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
    """The steps of ``text`` as examples hold them: no "[Reasoning]" tag, no outer white space."""
    tag = _TAG.match(text)
    body = text[tag.end() :] if tag else text
    return [step for piece in split_steps(body) if (step := piece.strip())]


def final_answer(text: str) -> str | None:
    """What stands behind the last "Answer:" or "answer is", else a reply of a single word.

    Emphasis and a full stop around it are dropped; the rest is not normalised.
    """
    answer = text if len(text.split()) == 1 else None
    for match in _STATED.finditer(text):
        behind = text[match.end() :].lstrip(" \t*").lstrip("\r\n")
        answer = behind.partition("\n")[0]
    return (answer or "").strip().strip("*").removesuffix(".").strip("*").strip() or None


def _lines(text: str) -> list[_Line]:
    lines, start, code = [], 0, False
    for part in text.split("\n"):
        fence = bool(_FENCE.match(part))
        lines.append(_Line(start, part, code))
        code ^= fence
        start += len(part) + 1
    return lines


def _counting(matches: Iterable[tuple[re.Match[str] | None, int]], first: int | None) -> list[int]:
    """Starts of the matches whose numbers count up by one, from ``first`` or from any number."""
    starts: list[int] = []
    wanted = first
    for match, start in matches:
        if match is not None and wanted in (None, int(match[1])):
            starts.append(start)
            wanted = int(match[1]) + 1
    return starts


def _paragraphs(lines: Sequence[_Line], until: int | None = None) -> list[int]:
    """Starts of the lines behind a blank line, up to ``until``."""
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
        # White space or the tag alone goes with what follows.
        tag = _TAG.match(held)
        if held[tag.end() if tag else 0 :].strip():
            steps.append(held)
            held = ""
    if held and steps:
        steps[-1] += held
    elif held:
        steps.append(held)
    return steps
