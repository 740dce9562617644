"""The data commands as functions of their options, which return the exit status."""

from __future__ import annotations

import sys
from pathlib import Path

from recipes.data_files.options import (
    ConvertOptions,
    InspectOptions,
    SplitOptions,
    ValidateOptions,
)
from recipes.terminal import say

LEAK = 3
"""The exit status of ``data validate`` where sets share questions, with or without errors."""


def data_validate(options: ValidateOptions) -> int:
    """Print the report; return 1 if a record cannot be used, 3 if sets share questions."""
    from recipes.data_files.convert import check_folder
    from recipes.data_files.validate import validate
    from recipes.run.files import json_text, output_file

    output = None
    if options.json is not None:
        check_folder("--json", options.json)
        inputs = (*options.files, options.meta, options.test)
        output = output_file("--json", options.json, overwrite=options.overwrite, inputs=inputs)
    page, figures = validate(options)
    print(page, file=sys.stderr if output is not None and output.path is None else sys.stdout)
    if output is not None:
        output.write_text(json_text(figures))
    if figures.get("leaks"):
        return LEAK
    return 0 if figures["usable"] else 1


def data_convert(options: ConvertOptions) -> int:
    """Write the converted file."""
    from recipes.data_files.convert import convert, root_of

    written = convert(options)
    root = f"; {_relative_to(root_of(options, options.file))}" if written.images else ""
    say(f"{options.out}: {written.examples:,} examples{root}")
    return 0


def data_inspect(options: InspectOptions) -> int:
    """Print one example as the model gets it."""
    from recipes.data_files.inspect import inspect

    print(inspect(options))
    return 0


def data_split(options: SplitOptions) -> int:
    """Write the parts."""
    from recipes.data_files.convert import root_of
    from recipes.data_files.split import split

    division = split(options)
    for name, (groups, rows) in division.parts.items():
        say(f"{options.out}/{name}.jsonl: {groups:,} groups, {rows:,} rows")
    if division.left[1]:
        groups, rows = division.left
        say(f"{groups:,} groups, {rows:,} rows are in no part: a part of size 'rest' takes them")
    if division.joined:
        say(f"{division.joined:,} groups were joined with others that have the same question")
    if division.images:
        say(_relative_to(root_of(options, options.file)))
    return 0


def _relative_to(root: Path) -> str:
    return f"images are relative to {root}: give it as --image-root"
