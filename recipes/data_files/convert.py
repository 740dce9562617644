"""``data convert``: from any known format to the project's, or to prompt/completions/labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prm.data.bad_rows import BadRows
from prm.data.reader import checked_rows, write_jsonl
from prm.data.stepwise_writer import read_weights, write_stepwise
from prm.schema import StepExample
from recipes.bad_rows import bad_rows_of, report_bad_rows
from recipes.data_files.options import ConvertOptions, FileOptions
from recipes.options.rules import check_together
from recipes.options.values import OptionError, existing_file
from recipes.run.files import note_unchecked, output_file
from recipes.terminal import say


@dataclass
class Written:
    """Counts what is written: the number of examples, and whether one has an image."""

    examples: int = 0
    images: bool = False

    def through(self, examples: Iterator[StepExample]) -> Iterator[StepExample]:
        """Pass the examples on, and count them."""
        for example in examples:
            self.examples += 1
            self.images = self.images or bool(example.images)
            yield example


def convert(options: ConvertOptions) -> Written:
    """Convert a file, one row at a time; return what was written.

    The whole source is checked as in training, except that images are checked for existence and
    place only. Nothing is written if a record cannot be used.

    Raises:
        OptionError: The file does not exist, the output exists, or the format has no weights.
        DataError: A record cannot be used, or ids and weights do not match.
        OSError: The output cannot be written.
    """
    if options.weights is not None and options.to != "stepwise":
        raise OptionError("--weights: only stepwise rows have a weight column; use --to stepwise")
    check_together(options)
    inputs = (options.file, options.weights)
    check_folder("--out", options.out)
    output_file("--out", options.out, overwrite=options.overwrite, inputs=inputs, streams=False)
    out = Path(options.out)
    written = Written()
    bad = bad_rows_of(options, Path(options.file), say)
    image_root = root_of(options, options.file)
    if options.to == "prm-jsonl":
        examples = examples_of(options, options.file, bad)
        write_jsonl(out, written.through(examples), image_root)
        report_bad_rows([bad], out, say)
        return written
    labels = (step.label for e in examples_of(options, options.file) for step in e.steps)
    soft = any(label not in (None, 0.0, 1.0) for label in labels)
    weights = None if options.weights is None else read_weights(existing_file(options.weights))
    examples = written.through(examples_of(options, options.file, bad))
    write_stepwise(out, examples, image_root, soft=soft, weights=weights)
    report_bad_rows([bad], out, say)
    if options.weights is not None:
        note_unchecked(Path(options.weights))
    return written


def examples_of(
    options: FileOptions, file: str, bad_rows: BadRows | None = None
) -> Iterator[StepExample]:
    """Yield the examples of a file, each checked; ``bad_rows`` notes what is left out."""
    path = existing_file(file)
    rows = checked_rows(
        path,
        options.image_root,
        format=options.format,
        allow_outside_images=options.allow_outside_images,
        bad_rows=bad_rows_of(options, path) if bad_rows is None else bad_rows,
    )
    return (example for row in rows for example in row.examples)


def root_of(options: FileOptions, file: str) -> Path:
    """Return the folder that the image paths of ``file`` are relative to."""
    return Path(file).parent if options.image_root is None else Path(options.image_root)


def check_folder(flag: str, path: str) -> None:
    """Refuse a file to write whose folder does not exist, before anything is read.

    Of a symbolic link it is the folder of what it points to.

    Raises:
        OptionError: The folder does not exist.
    """
    folder = (Path(path).resolve() if Path(path).is_symlink() else Path(path)).parent
    if not folder.is_dir():
        raise OptionError(f"{flag} {path}: no such folder {folder}; make it first")
