"""``data convert``: any known format to the project's own, or to prompt/completions/labels rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prm.data.reader import checked_rows, write_jsonl
from prm.data.stepwise_writer import read_weights, write_stepwise
from prm.schema import StepExample
from recipes.data_files.options import ConvertOptions, FileOptions
from recipes.options.values import OptionError


def convert(options: ConvertOptions) -> int:
    """Convert a file, one row at a time; returns how many examples were written.

    The whole source is checked as training would, but for its images, of which only existence and
    place are; nothing is written if a record cannot be used.

    Raises:
        OptionError: No such file, an output that exists, or weights for a format without them.
        DataError: A record that cannot be used, or ids and weights that do not fit.
    """
    if options.weights is not None and options.to != "stepwise":
        raise OptionError("--weights: only stepwise rows have a weight column; use --to stepwise")
    out = new_file(options.out)
    counter = _Counter()
    image_root = root_of(options, options.file)
    if options.to == "prm-jsonl":
        write_jsonl(out, counter.through(examples_of(options, options.file)), image_root)
        return counter.count
    labels = (step.label for e in examples_of(options, options.file) for step in e.steps)
    soft = any(label not in (None, 0.0, 1.0) for label in labels)
    weights = None if options.weights is None else read_weights(existing_file(options.weights))
    examples = counter.through(examples_of(options, options.file))
    write_stepwise(out, examples, image_root, soft=soft, weights=weights)
    return counter.count


def examples_of(options: FileOptions, file: str) -> Iterator[StepExample]:
    """The examples of a file, checked, one at a time."""
    rows = checked_rows(
        existing_file(file),
        options.image_root,
        format=options.format,
        allow_outside_images=options.allow_outside_images,
    )
    return (example for row in rows for example in row.examples)


def root_of(options: FileOptions, file: str) -> Path:
    """The folder that the image paths of ``file`` are relative to."""
    return Path(file).parent if options.image_root is None else Path(options.image_root)


def existing_file(path: str) -> Path:
    """The path of a file that is there.

    Raises:
        OptionError: It is not.
    """
    if not Path(path).is_file():
        raise OptionError(f"{path}: no such file; check the path")
    return Path(path)


def new_file(path: str) -> Path:
    """The path of a file that is not there yet, in a folder that is.

    Raises:
        OptionError: It is, or the folder is not.
    """
    file = Path(path)
    if file.exists():
        raise OptionError(f"--out {path}: exists; remove it or give another name")
    if not file.parent.is_dir():
        raise OptionError(f"--out {path}: no such folder {file.parent}; make it first")
    return file


class _Counter:
    """Counts what passes through."""

    def __init__(self) -> None:
        self.count = 0

    def through(self, examples: Iterator[StepExample]) -> Iterator[StepExample]:
        for example in examples:
            self.count += 1
            yield example
