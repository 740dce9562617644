"""What is asked of examples that were read, and of a refusal."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from prm.data.reader import iter_rows, write_jsonl
from prm.schema import DataError, StepExample


def check_examples(examples: list[StepExample], path: Path) -> None:
    """They are what the schema says, and can be written and read back."""
    for example in examples:
        assert example.id.strip()
        assert example.question.strip()
        assert example.steps
        for step in example.steps:
            assert step.text.strip()
            assert step.label is None or (0 <= step.label <= 1 and math.isfinite(step.label))
        assert example.correct in (None, True, False)
    written = path.with_name("written.jsonl")
    refused = refusal(lambda: write_jsonl(written, examples, path.parent))
    if refused is not None:
        # What stands beside the fields under the name of one, and paths below the root by detours.
        assert refused.expected == "an example that reads back as it was written"
        return
    assert [e for row in iter_rows(written, format="prm-jsonl") for e in row.examples] == examples


def refusal(write: Callable[[], None]) -> DataError | None:
    try:
        write()
    except DataError as error:
        return error
    return None


def read_rows(path: Path, format: str) -> list[StepExample]:
    """As ``read_examples``, images not looked for."""
    examples = []
    for row in iter_rows(path, format=format):
        if isinstance(row, DataError):
            raise row
        examples += row.examples
    return examples


def check_refusal(error: DataError, path: Path) -> None:
    assert error.file == path
    assert error.expected
    assert error.found
    assert error.line is not None or error.found == "an empty file"
    # Broken text has a place only; a broken record a field, too, unless it is none of the format.
    str(error).encode()
