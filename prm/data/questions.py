"""What the same question is: the same words, and pictures of the same content.

Case, white space, the Unicode form, the font, full and half width, the kind of a quotation mark or
dash, invisible characters and the marks of the pictures among the words do not count, nor do the
paths of the pictures. Every check for a
question on two sides asks this module: a division of a file, a comparison of files, and the refusal
of a test set that something was tuned on. What a model reads stays as it is.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from prm.data_urls import opened
from prm.schema import StepExample

_MORE_THAN_A_FORM = ("<super>", "<sub>", "<fraction>", "<circle>", "<square>")
"""Kinds of Unicode's equivalents that say more than the plain characters: 2² is not 22."""
_IGNORED = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
"""What nobody sees beyond the categories Cc and Cf, variation selectors above all: the rest of
Unicode's Default_Ignorable_Code_Point (DerivedCoreProperties.txt)."""
_UNSEEN_ASCII = {code: None for code in (*range(32), 127) if not chr(code).isspace()}
_PLAIN_SIGN = {
    **dict.fromkeys("‘’‚‛ʼ′", "'"),
    **dict.fromkeys("“”„‟″", '"'),
    **dict.fromkeys("‐‑‒–—―−", "-"),
}
"""What typography and keyboards write differently: ’ is ', and −5 is -5."""
_MARK = "<image>"
_NUMBERED_MARK = re.compile(r"<image[ _]?(\d{1,4})>")
"""The mark of the first, second, ... picture, as of MMMU."""


def words_of(text: str) -> list[str]:
    """Return the words of a text by which a repeated one is recognised."""
    if text.isascii():
        folded = text.lower().translate(_UNSEEN_ASCII)
    else:
        usual = "".join(map(_usual, unicodedata.normalize("NFD", text))).casefold()
        folded = unicodedata.normalize("NFC", "".join(map(_seen, usual)))
    folded = folded.replace(_MARK, " ")
    numbers = _NUMBERED_MARK.findall(folded) if "<image" in folded else []
    if numbers == [str(number) for number in range(1, len(numbers) + 1)]:
        folded = _NUMBERED_MARK.sub(" ", folded)  # In another order the numbers say something.
    return folded.split()


@lru_cache(maxsize=4096)
def _usual(character: str) -> str:
    """Return what a character is another form of: fullwidth, a ligature, of another font."""
    if character in _PLAIN_SIGN:
        return _PLAIN_SIGN[character]
    kind = unicodedata.decomposition(character)
    if kind.startswith("<") and not kind.startswith(_MORE_THAN_A_FORM):
        return unicodedata.normalize("NFKC", character)
    return character


@lru_cache(maxsize=4096)
def _seen(character: str) -> str:
    """Return a character, or nothing for one that nobody sees."""
    unseen = unicodedata.category(character) in ("Cc", "Cf") and not character.isspace()
    return "" if unseen or _IGNORED.match(character) else character


def digest(texts: Iterable[str]) -> int:
    """Return a 64-bit hash of several texts and the boundaries between them."""
    hashed = hashlib.blake2b(digest_size=8)
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        hashed.update(b"%d:" % len(raw) + raw)
    return int.from_bytes(hashed.digest(), "little")


class Questions:
    """Compares questions by a hash; the file of each picture is read once."""

    def __init__(self) -> None:
        self._contents: dict[Path, str] = {}

    def key(self, example: StepExample) -> int:
        """Return a hash that is equal for the same question: words, and content of the pictures."""
        return digest((*words_of(example.question), "\n", *self.contents(example.images)))

    def contents(self, images: Sequence[Path]) -> list[str]:
        """Return a hash of the content of each image, or its path if it cannot be read."""
        for image in images:
            if image not in self._contents:
                self._contents[image] = _content(image)
        return [self._contents[image] for image in images]


def _content(image: Path) -> str:
    try:
        with opened(image) as file:
            hashed = hashlib.blake2b(digest_size=16)
            while block := file.read(2**20):
                hashed.update(block)
            return hashed.hexdigest()
    except (OSError, ValueError):
        return str(image)  # The checks of images name it.
