"""``data convert``: from any known format to the project's, or to prompt/completions/labels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prm.data.reader import checked_rows, write_jsonl
from prm.data.stepwise_writer import read_weights, write_stepwise
from prm.schema import StepExample
from recipes.data_files.options import ConvertOptions, FileOptions
from recipes.options.values import OptionError
from recipes.run.files import note_unchecked, output_file


def convert(options: ConvertOptions) -> int:
    """Convert a file, one row at a time; return the number of examples written.

    The whole source is checked as in training, except that images are checked for existence and
    place only. Nothing is written if a record cannot be used.

    Raises:
        OptionError: The file does not exist, the output exists, or the format has no weights.
        DataError: A record cannot be used, or ids and weights do not match.
        OSError: The output cannot be written.
    """
    if options.weights is not None and options.to != "stepwise":
        raise OptionError("--weights: only stepwise rows have a weight column; use --to stepwise")
    inputs = (options.file, options.weights)
    check_folder("--out", options.out)
    output_file("--out", options.out, overwrite=options.overwrite, inputs=inputs, streams=False)
    out = Path(options.out)
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
    if options.weights is not None:
        note_unchecked(Path(options.weights))
    return counter.count


def examples_of(options: FileOptions, file: str) -> Iterator[StepExample]:
    """Yield the examples of a file, each checked."""
    rows = checked_rows(
        existing_file(file),
        options.image_root,
        format=options.format,
        allow_outside_images=options.allow_outside_images,
    )
    return (example for row in rows for example in row.examples)


def root_of(options: FileOptions, file: str) -> Path:
    """Return the folder that the image paths of ``file`` are relative to."""
    return Path(file).parent if options.image_root is None else Path(options.image_root)


def existing_file(path: str) -> Path:
    """Return the path of a file that exists.

    Raises:
        OptionError: The file does not exist.
    """
    if not Path(path).is_file():
        raise OptionError(f"{path}: no such file; check the path")
    return Path(path)


def check_folder(flag: str, path: str) -> None:
    """Refuse a file to write whose folder does not exist, before anything is read.

    Raises:
        OptionError: The folder does not exist.
    """
    folder = Path(path).parent
    if not folder.is_dir():
        raise OptionError(f"{flag} {path}: no such folder {folder}; make it first")


class _Counter:
    """Counts the items that it passes on."""

    def __init__(self) -> None:
        self.count = 0

    def through(self, examples: Iterator[StepExample]) -> Iterator[StepExample]:
        for example in examples:
            self.count += 1
            yield example
