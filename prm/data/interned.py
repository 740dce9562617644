"""Texts that are numbered in the order in which they come, in a few bytes each.

A million ids as a ``dict[str, int]`` take some 200 MB, and worker processes that are forked copy
all of it, because looking at a Python object writes its reference count. Here the texts lie end to
end in one buffer, and a table of numbers finds them: some 20 bytes beyond the text itself.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, MutableSequence

_LEAST = 8
_FREE = -1


class Interned(Mapping[str, int]):
    """The number of every text that was added, counted from 0; equal texts have one number.

    The table is open addressing with linear probing, at most half full. It holds numbers alone, and
    texts are compared themselves, so two texts of one hash stay apart.

    Args:
        texts: The first texts.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._buffer = bytearray()
        self._ends = array("q")
        self._table = array("i", [_FREE]) * _LEAST
        for text in texts:
            self.add(text)

    def add(self, text: str) -> int:
        """Return the number of ``text``, a new one if it was not added before."""
        raw = _raw_of(text)
        slot, number = self._find(raw)
        if number != _FREE:
            return number
        number = len(self._ends)
        self._table[slot] = number
        self._buffer += raw
        self._ends.append(len(self._buffer))
        if 2 * len(self._ends) > len(self._table):
            self._spread(2 * len(self._table))
        return number

    def text(self, number: int) -> str:
        """Return the text of a number.

        Raises:
            IndexError: There is no such number.
        """
        if not 0 <= number < len(self._ends):
            raise IndexError(f"expected a number from 0 to {len(self._ends) - 1}, found {number}")
        return self._raw(number).decode("utf-8", "surrogatepass")

    def __getitem__(self, text: str) -> int:
        number = self.get(text)
        if number is None:
            raise KeyError(text)
        return number

    def get(self, text: object, default: int | None = None) -> int | None:  # type: ignore[override]
        """Return the number of ``text``, or ``default`` if it was not added."""
        number = self._find(_raw_of(text))[1] if isinstance(text, str) else _FREE
        return default if number == _FREE else number

    def __contains__(self, text: object) -> bool:
        return self.get(text) is not None

    def __iter__(self) -> Iterator[str]:
        return map(self.text, range(len(self)))

    def __len__(self) -> int:
        return len(self._ends)

    def __getstate__(self) -> tuple[bytes, MutableSequence[int]]:
        return bytes(self._buffer), self._ends

    def __setstate__(self, state: tuple[bytes, MutableSequence[int]]) -> None:
        # The table is made anew: another process has other hashes.
        self._buffer, self._ends = bytearray(state[0]), array("q", state[1])
        size = _LEAST
        while size < 2 * len(self._ends):
            size *= 2
        self._spread(size)

    def _raw(self, number: int) -> bytes:
        start = self._ends[number - 1] if number else 0
        return bytes(self._buffer[start : self._ends[number]])

    def _find(self, raw: bytes) -> tuple[int, int]:
        """Return the place in the table of a text, and its number or ``_FREE``."""
        table, ends, buffer = self._table, self._ends, self._buffer
        mask = len(table) - 1
        slot = hash(raw) & mask
        while (number := table[slot]) != _FREE:
            end = ends[number]
            start = end - len(raw)
            if buffer[start:end] == raw and start == (ends[number - 1] if number else 0):
                break
            slot = (slot + 1) & mask
        return slot, number

    def _spread(self, size: int) -> None:
        table = array("i", [_FREE]) * size
        for number in range(len(self._ends)):
            slot = hash(self._raw(number)) & (size - 1)
            while table[slot] != _FREE:
                slot = (slot + 1) & (size - 1)
            table[slot] = number
        self._table = table


def _raw_of(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
