"""Letters of a multiple choice: "B", "(B)", "B) 12 cm", "B - 12 cm", "A and C", "AC".

One letter with its text is that letter. Several letters with a text each are none: "A. rises, B.
falls" may assign the texts to A and B, and as "A,B" it would be one with "A. falls, B. rises".
"""

from __future__ import annotations

import re

_LETTER = re.compile(r"\$?[(\[]?\s*([A-Z]|[a-h])\s*[)\]]?\s*[.:]?")
"""One letter alone. Of the small ones i, x, n and the like are variables."""
_SEPARATED = re.compile(r"[(\[]?[A-J][)\]]?(?:\s*(?:,|;|&|\band\b|,\s*and\b)\s*[(\[]?[A-J][)\]]?)+")
_JOINED = re.compile(r"[A-H]{2,8}|(?:\([A-J]\)){2,}")
_JOINED_WORDS = frozenset({"AD", "AH", "BE", "EH", "ACE", "AGE", "BEG"})
_WITH_TEXT = re.compile(r"(?:[(\[]([A-Z])[)\]][.:]?|([A-Z])\)|([A-J])[.:])\s+(\S.*)", re.DOTALL)
_NOT_ANOTHER = re.compile(
    r"[(\[]?([A-J])[)\]]?(?:,\s*not|\s+\(not)\s+[(\[]?[A-J][)\]]?(?:(?:,|,?\s+or)\s+[(\[]?[A-J][)\]]?)*\)?"
)
_INITIALS = re.compile(r"[A-Z]\.\s*[A-Z]\.")
_DASH_AND_TEXT = re.compile(r"([A-J])\s+-\s+(.*[A-Za-z]{2}.*)", re.DOTALL)
_IN_BRACKETS = re.compile(r"([A-J])\s+\(([^()]*[A-Za-z]{2}[^()]*)\)")
_ANOTHER = re.compile(r"(?<![^\s,;&])(?:[(\[][A-Z][)\]]|[A-J](?:[.):](?!\w)|\s+-\s))(?!\s*[(\[]?$)")
"""A second letter that is set off as the first one is, with a text behind."""
_ANOTHER_BARE = re.compile(r"[^A-J]*(?:[,;&]|\b(?:and|or)\b)\s*[(\[]?[A-J][)\]]?[.:]?")
"""A text without such letters, and one behind it: "5 and C", but not "vitamins A and C"."""
_ON_OTHERS = re.compile(
    r"(?:all|any|both|each|either|neither|none|only|just|options?|choices?|statements?)\b", re.I
)
"""How an option begins that speaks of others: "(D) Both (A) and (B)"."""
_FORMULA = re.compile(r"[\\^_=+*/<>]|\b(?:sin|cos|tan|log|ln|sqrt|exp)\b")


def choice(text: str) -> str | None:
    """Return the letters of an answer that is a choice, in order and by commas; None if it is none.

    - A letter alone, in brackets, or with a full stop or colon behind. A small one counts up to h.
    - Several letters: "A and C", "(A), (C)" and, in the order of the alphabet, "AC"; not words such
      as "BE".
    - A letter and the text of the option: "(K) 12 cm", "K) 12 cm"; of the letters to J also
      "B. 12 cm" (but not initials: "J. K. Rowling"), "B (12 cm)" and "B - 12 cm", if a word stands
      behind the dash and no formula: "B - 12" is a difference.
    - A letter and others that are ruled out: "C, not D"; without the comma it may be a formula.

    A text that holds, or is, other letters is none of an option ("A. 5, C. 7", "A. 5 and C",
    "A. B and C", the ratio "A: B"), unless it says so: "D. Both A and B".
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
        return None if _names_others(match[4]) else match[1] or match[2] or match[3]
    match = _NOT_ANOTHER.fullmatch(text)
    if match:
        return match[1]
    match = _DASH_AND_TEXT.fullmatch(text) or _IN_BRACKETS.fullmatch(text)
    if match and not _FORMULA.search(match[2]) and not _names_others(match[2]):
        return match[1]
    return None


def _names_others(text: str) -> bool:
    """Return whether what stands behind a letter names other ones that are chosen, too."""
    if _ON_OTHERS.match(text):
        return False
    return bool(
        _LETTER.fullmatch(text)
        or _SEPARATED.fullmatch(text)
        or _ANOTHER.search(text)
        or _ANOTHER_BARE.fullmatch(text)
    )
