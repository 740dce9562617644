"""Options of the data commands. Nothing here imports torch, so that ``--help`` is fast."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, Literal

from prm.names import FormatChoice
from recipes.options.base import (
    MOST_ROWS,
    MOST_SEED,
    Condition,
    PrmOptions,
    ReadOptions,
    option,
)
from recipes.options.parse import build_parser


@dataclass(frozen=True, kw_only=True)
class FileOptions(ReadOptions):
    """The options of every command that reads data files."""

    format: FormatChoice = option("auto", "format of the files; auto: what the first record is")
    image_root: str | None = option(
        None, "folder that image paths are relative to (default: the folder of each file)"
    )
    allow_outside_images: bool = option(False, "take images outside the image root, too")


JSON_NAMED = Condition(
    lambda given: given.json is not None, text="{flags} has no effect without --json"
)


@dataclass(frozen=True, kw_only=True)
class ValidateFlags(FileOptions):
    """Read every record and report what is wrong or doubtful, on one page."""

    meta: str | None = option(None, "meta file: checked, too, and compared with the others")
    test: str | None = option(None, "test file: checked, too, and compared with the others")
    json: str | None = option(
        None,
        "write the findings to this JSON file; -: to standard output, the page to standard error",
    )
    overwrite: bool = option(False, "replace an existing --json", only_with=JSON_NAMED)
    images: Literal["exists", "header", "decode"] = option(
        "header",
        "how closely each image is looked at: it is there; its header, and whether it is cut off; "
        "every pixel",
    )
    model: str | None = option(
        None, "count tokens and tiles for this model ('embedded', a directory or hub name)"
    )
    max_patches: int | None = option(
        None,
        "at most this many tiles per image, when counting them (default: as the model was trained, "
        "or else 6)",
        least=1,
        most=256,
    )


@dataclass(frozen=True, kw_only=True)
class ValidateOptions(ValidateFlags):
    """``ValidateFlags`` and the files."""

    files: tuple[str, ...] = option(..., "files to check, together one training set")


@dataclass(frozen=True, kw_only=True)
class ConvertFlags(FileOptions):
    """Rewrite a file in the project's format or as prompt/completions/labels rows."""

    to: Literal["prm-jsonl", "stepwise"] = option("prm-jsonl", "format to write")
    out: str = option(..., "file to write")
    overwrite: bool = option(False, "replace an existing --out")
    weights: str | None = option(
        None, "weights.jsonl of a run on this file: joined by id as a column (stepwise)"
    )


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(ConvertFlags):
    """``ConvertFlags`` and the file."""

    file: str = option(..., "file to convert")


@dataclass(frozen=True, kw_only=True)
class InspectFlags(PrmOptions):
    """Show one example as the model gets it."""

    row: int = option(
        1, "line of a JSONL file, row of a JSON array, counted from 1", least=1, most=MOST_ROWS
    )
    candidate: int = option(
        0, "which candidate of the row, counted from 0", least=0, most=MOST_ROWS
    )
    format: FormatChoice = option("auto", "format of the file; auto: what the first record is")
    weights: str | None = option(None, "weights.jsonl of a run on this file")
    tokens: bool = option(False, "list every token, too")


@dataclass(frozen=True, kw_only=True)
class InspectOptions(InspectFlags):
    """``InspectFlags`` and the file."""

    file: str = option(..., "file to look into")


@dataclass(frozen=True, kw_only=True)
class SplitFlags(FileOptions):
    """Divide a file at random into parts that share no question."""

    out: str = option(..., "directory for the parts, <name>.jsonl each; must not exist")
    parts: tuple[str, ...] = option(
        ..., "name=size of each part, one size may be 'rest', for example train=rest dev=100"
    )
    unit: Literal["groups", "rows"] = option("groups", "what the sizes count")
    seed: int = option(0, "fixes which group goes where", least=0, most=MOST_SEED)


@dataclass(frozen=True, kw_only=True)
class SplitOptions(SplitFlags):
    """``SplitFlags`` and the file."""

    file: str = option(..., "file to divide")


def build_data_parser(parser: argparse.ArgumentParser, options: type[Any]) -> None:
    """Add the arguments of a data command: files are positional, all other options are flags."""
    flags = options.__bases__[0]
    if options is ValidateOptions:
        parser.add_argument("files", nargs="+", metavar="FILE", help="files to check")
    else:
        parser.add_argument("file", metavar="FILE", help="file to read")
    build_parser(parser, flags, preset=False)
