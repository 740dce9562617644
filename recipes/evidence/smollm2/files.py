"""The files of a seed, whatever is judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from prm.data.reader import write_jsonl
from prm.schema import StepExample
from recipes.run.files import complete_directory


def unlabelled(example: StepExample) -> StepExample:
    """Return the example without step labels."""
    return replace(example, steps=tuple(replace(step, label=None) for step in example.steps))


def write_parts(parts: Mapping[str, Sequence[StepExample]], directory: Path) -> dict[str, int]:
    """Write each part as a file into a new directory; return their numbers of rows.

    The directory appears under its name only when it is complete.
    """
    with complete_directory(directory) as unfinished:
        for name, rows in parts.items():
            write_jsonl(unfinished / f"{name}.jsonl", rows)
    return {name: len(rows) for name, rows in parts.items()}
