"""Brackets in the plain text of an answer."""

from __future__ import annotations

import re

OPENING = {"(": ")", "[": "]", "{": "}"}
_CLOSING = frozenset(OPENING.values())


def spans(text: str) -> bool:
    """Return whether the last character closes the first bracket, of any kind: (1, 2]."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character in OPENING) - (character in _CLOSING)
        if not depth:
            return index == len(text) - 1
    return False


def split_outside(text: str, separators: str) -> list[str]:
    """Split at ``separators``, a pattern, outside brackets, and strip the parts."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(rf"[(\[{{]|[)\]}}]|{separators}", text):
        if match[0] in OPENING:
            depth += 1
        elif match[0] in _CLOSING:
            depth -= 1
        elif not depth:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    return [*parts, text[start:].strip()]
