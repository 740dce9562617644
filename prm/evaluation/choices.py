"""Letters of a multiple choice: "B", "(B)", "B) 12 cm", "B - 12 cm", "A and C", "AC"."""

from __future__ import annotations

import re

_LETTER = re.compile(r"\$?[(\[]?\s*([A-Z]|[a-h])\s*[)\]]?\s*[.:]?")
"""One letter alone. Of the small ones i, x, n and the like are variables."""
_SEPARATED = re.compile(r"[(\[]?[A-J][)\]]?(?:\s*(?:,|;|&|\band\b|,\s*and\b)\s*[(\[]?[A-J][)\]]?)+")
_JOINED = re.compile(r"[A-H]{2,8}|(?:\([A-J]\)){2,}")
_JOINED_WORDS = frozenset({"AD", "AH", "BE", "EH", "ACE", "AGE", "BEG"})
_WITH_TEXT = re.compile(r"(?:[(\[]([A-Z])[)\]][.:]?|([A-Z])\)|([A-J])[.:])\s+\S.*", re.DOTALL)
_INITIALS = re.compile(r"[A-Z]\.\s*[A-Z]\.")
_DASH_AND_TEXT = re.compile(r"([A-J])\s+-\s+(.*[A-Za-z]{2}.*)", re.DOTALL)
_FORMULA = re.compile(r"[\\^_=+*/<>]|\b(?:sin|cos|tan|log|ln|sqrt|exp)\b")


def choice(text: str) -> str | None:
    """Return the letters of an answer that is a choice, in order and by commas; None if it is none.

    - A letter alone, in brackets, or with a full stop or colon behind. A small one counts up to h.
    - Several letters: "A and C", "(A), (C)" and, in the order of the alphabet, "AC"; not words such
      as "BE".
    - A letter and the text of the option: "(K) 12 cm", "K) 12 cm"; of the letters to J also
      "B. 12 cm" (but not initials: "J. K. Rowling") and "B - 12 cm", if a word stands behind the
      dash and no formula: "B - 12" is a difference.
    """
    if match := _LETTER.fullmatch(text):
        return match[1].upper()
    if _SEPARATED.fullmatch(text) or (
        _JOINED.fullmatch(text)
        and text not in _JOINED_WORDS
        and (letters := re.findall("[A-J]", text)) == sorted(set(letters))
    ):
        return ",".join(sorted(set(re.findall("[A-J]", text))))
    if (match := _WITH_TEXT.fullmatch(text)) and not _INITIALS.match(text):
        return match[1] or match[2] or match[3]
    if (match := _DASH_AND_TEXT.fullmatch(text)) and not _FORMULA.search(match[2]):
        return match[1]
    return None
