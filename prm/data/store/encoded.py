"""A sequence of tokenised examples, each of which is tokenised when it is asked for."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import overload

from prm.data.store.examples import StoredExamples
from prm.inputs.collate import Collator, EncodedExample
from prm.schema import DataError, StepExample

MOST_HELD = 4096
"""How many examples are kept tokenised, some 8 kB each."""

_AT_ONCE = 256


class EncodedExamples(Sequence[EncodedExample]):
    """The examples of a file, tokenised on demand: by the process that makes the batch.

    Of those that batches ask for, the first few thousand are kept, so that a small file is
    tokenised once; they are read again if the file may have changed.

    Args:
        examples: The examples.
        collator: What tokenises them.
        path: Their file, for messages.
        lines: The line of each, for messages.
    """

    def __init__(
        self,
        examples: Sequence[StepExample],
        collator: Collator,
        path: Path,
        lines: Sequence[int],
    ) -> None:
        self._examples, self._collator = examples, collator
        self._path, self._lines = path, lines
        self._held: dict[int, EncodedExample] = {}
        self._version = self._now

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, row: int) -> EncodedExample: ...
    @overload
    def __getitem__(self, row: slice) -> list[EncodedExample]: ...
    def __getitem__(self, row: int | slice) -> EncodedExample | list[EncodedExample]:
        if isinstance(row, slice):
            return self._encoded(range(len(self))[row], self._examples[row])
        number = range(len(self))[row]
        return self._encoded([number], [self._examples[number]])[0]

    def __iter__(self) -> Iterator[EncodedExample]:
        for start in range(0, len(self), _AT_ONCE):
            yield from self[start : start + _AT_ONCE]

    def at(self, rows: Sequence[int]) -> list[EncodedExample]:
        """Return the given examples, which are read and tokenised together.

        Raises:
            DataError: The file has changed, or an example cannot be laid out.
        """
        if self._version != (version := self._now):
            self._held.clear()
            self._version = version
        held, examples = self._held, self._examples
        wanted = [row for row in dict.fromkeys(rows) if row not in held]
        if isinstance(examples, StoredExamples):
            made = self._encoded(wanted, examples.at(wanted))
        else:
            made = self._encoded(wanted, [examples[row] for row in wanted])
        new = dict(zip(wanted, made, strict=True))
        batch = [held[row] if row in held else new[row] for row in rows]
        held.update(list(new.items())[: MOST_HELD - len(held)])
        return batch

    @property
    def _now(self) -> Hashable:
        return self._examples.version if isinstance(self._examples, StoredExamples) else None

    def _encoded(
        self, rows: Sequence[int], examples: Sequence[StepExample]
    ) -> list[EncodedExample]:
        encoded = []
        for row, result in zip(rows, self._collator.encode_many(examples), strict=True):
            if isinstance(result, DataError):
                raise located(result, self._path, self._lines[row])
            encoded.append(result)
        return encoded


def located(error: DataError, file: Path, line: int) -> DataError:
    """Return an error of an example with its line, unless it names a file of its own."""
    return error if error.file is not None else error.copy(file=file, line=line)
