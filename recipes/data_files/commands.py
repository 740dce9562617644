"""The data commands as functions of their options, which return the exit status."""

from __future__ import annotations

import sys

from recipes.data_files.options import (
    ConvertOptions,
    InspectOptions,
    SplitOptions,
    ValidateOptions,
)
from recipes.terminal import say


def data_validate(options: ValidateOptions) -> int:
    """Print the report; return 1 if a record cannot be used."""
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
    return 1 if figures["errors"] else 0


def data_convert(options: ConvertOptions) -> int:
    """Write the converted file."""
    from recipes.data_files.convert import convert, root_of

    count = convert(options)
    root = root_of(options, options.file)
    say(
        f"{options.out}: {count:,} examples; images are relative to {root}: give it as --image-root"
    )
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

    for name, (groups, rows) in split(options).items():
        say(f"{options.out}/{name}.jsonl: {groups:,} groups, {rows:,} rows")
    say(f"images are relative to {root_of(options, options.file)}: give it as --image-root")
    return 0
