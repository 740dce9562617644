"""What the same question is: the same words, and pictures of the same content.

Case, white space, the Unicode form, full and half width, and invisible characters of the words do
not count, nor do the paths of the pictures. Every check for a question on two sides asks this
module: a division of a file, a comparison of files, and the refusal of a test set that something
was tuned on.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from prm.data_urls import opened
from prm.schema import StepExample

_SAME_CHARACTER = ("<wide>", "<narrow>", "<compat>")
"""Kinds of Unicode's equivalents that are one character to a reader, unlike 2² and 22."""
# Soft hyphen, zero-width space and joiners, directional marks, word joiner, byte order mark.
_INVISIBLE = dict.fromkeys(
    map(ord, "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"),
)


def words_of(text: str) -> list[str]:
    """Return the words of a text by which a repeated one is recognised."""
    if text.isascii():
        return text.lower().split()
    folded = "".join(map(_usual, unicodedata.normalize("NFD", text))).casefold()
    return unicodedata.normalize("NFC", folded).translate(_INVISIBLE).split()


@lru_cache(maxsize=4096)
def _usual(character: str) -> str:
    if unicodedata.decomposition(character).startswith(_SAME_CHARACTER):
        return unicodedata.normalize("NFKC", character)
    return character


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
