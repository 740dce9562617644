"""Letters whose case has a meaning: CO and Co, 3 T and 3 t, AaBb and AABb, but not Cat and cat."""

from __future__ import annotations

import re

from prm.evaluation.latex import FUNCTIONS

_SHORT_WORD = re.compile(
    "ai|am|an|as|at|be|by|do|dr|eg|go|he|hi|if|in|is|it|me|mr|ms|my|nd|no|of|oh|ok|on|or|ox|"
    "ph|pm|rd|so|st|th|to|tv|uk|up|us|vs|we"
)
"""A word of two letters. An answer "NO" is rather "no" than nitric oxide."""
_ELEMENT = re.compile(
    "a[cglmrstu]|b[aehikr]?|c[adeflmnorsu]?|d[bsy]|e[rsu]|f[elmr]?|g[ade]|h[efgos]?|i[nr]?|"
    "k[r]?|l[airuv]|m[cdgnot]|n[abdehiop]?|o[gs]?|p[abdmortu]?|r[abefghnu]|s[bcegimnr]?|"
    "t[abcehilms]|u|v|w|x[e]|y[b]?|z[nr]"
)
"""A symbol of a chemical element, in lower case."""
_ALLELES = re.compile(r"(?:([^\W\d_])\1)+")
"""Each letter twice: AaBb and aabb, lower case."""
_HEXADECIMAL = re.compile(r"0[xX][0-9a-fA-F]+|[0-9a-fA-F]+_(?:16|\(16\))")
_UNKNOWNS = re.compile(r"(?=.*\d)(?=.*[-+*/^])[XYZ\d.+*/^()=<>≤≥-]+")
_LONGEST_FORMULA = 20
_OTHER_THAN_GREEK = re.compile("[^Ͱ-Ͽ]+")


def without_case(word: str, after: str) -> str:
    """Return a word in lower case, unless its case has a meaning.

    It has in these:

    - a symbol of one or two letters, such as x, CO or kN, that is none of the English words of two
      letters and no function; but not in "A" or the letter of "X-ray" in front of a word;
    - a chemical formula that is another one in other letters: CoCl and COCl, but not NaCl;
    - alleles: AaBb, AABb and AABB;
    - letters of Greek, wherever they stand.

    Args:
        word: Letters without spaces between them.
        after: The text behind it.
    """
    lower = _OTHER_THAN_GREEK.sub(lambda m: m[0].casefold(), word)
    is_mixed = word not in (word.upper(), word.lower(), word.capitalize())
    if (lower in FUNCTIONS and not is_mixed) or _SHORT_WORD.fullmatch(lower):
        return lower
    if len(word) == 1:
        article = lower == "a" and re.match(r" [^\W\d_]{2,}", after)
        compound = re.match(r"-([^\W\d_]{3,})", after)
        is_word = article or (compound and compound[1].casefold() not in FUNCTIONS)
        return lower if is_word else word
    if len(word) == 2 or (_ALLELES.fullmatch(lower) and len(word) % 2 == 0):
        return word
    is_formula = is_mixed and len(word) <= _LONGEST_FORMULA and _formulas(lower) > 1
    return word if is_formula else lower


def is_without_case(text: str) -> bool:
    """Return whether case has no meaning in a text: 0xFF and FF_16, X^2+1 of X, Y and Z alone."""
    return bool(_HEXADECIMAL.fullmatch(text) or _UNKNOWNS.fullmatch(text))


def _formulas(lower: str) -> int:
    """Return in how many ways letters can be read as symbols of chemical elements."""
    ways = [1]
    for end in range(1, len(lower) + 1):
        ways.append(
            sum(
                ways[at] for at in range(max(0, end - 2), end) if _ELEMENT.fullmatch(lower, at, end)
            )
        )
    return ways[-1]
