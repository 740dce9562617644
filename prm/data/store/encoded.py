"""A sequence of tokenised examples, each of which is tokenised when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

from prm.data.store.examples import StoredExamples
from prm.inputs.collate import Collator, EncodedExample
from prm.schema import DataError, StepExample

_AT_ONCE = 256


class EncodedExamples(Sequence[EncodedExample]):
    """The examples of a file, tokenised on demand: by the process that makes the batch.

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
        examples = self._examples
        if isinstance(examples, StoredExamples):
            return self._encoded(rows, examples.at(rows))
        return self._encoded(rows, [examples[row] for row in rows])

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
