"""Shared parts of the recipes: intervals over seeds, text tables, a JSON file, a command."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from recipes.options.base import flag_of
from recipes.options.parse import build_parser, resolve
from recipes.options.values import OptionError
from recipes.run.errors import reported
from recipes.run.files import check_writable, write_json
from recipes.run.provenance import environment

Options = TypeVar("Options")

# 97.5 % quantiles of Student's t distribution with 1, 2, ... degrees of freedom.
_STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)


class Interval(NamedTuple):
    """A mean and its 95 % interval; the ends are None for a single value."""

    mean: float
    low: float | None
    high: float | None


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean over seeds ± t s/√n, with Student's 97.5 % quantile t at n − 1 degrees.

    With more than 21 values the quantile of 20 degrees of freedom is used, which makes the interval
    at most 6 % too wide.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, None, None)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = _STUDENT[min(count - 1, len(_STUDENT)) - 1] * spread / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def percent(interval: Interval, *, sign: bool = False) -> str:
    """Return ``mean [low, high]`` in percent with one decimal."""
    form = "+.1f" if sign else ".1f"
    text = f"{100 * interval.mean:{form}}"
    if interval.low is None or interval.high is None:
        return text
    return f"{text} [{100 * interval.low:{form}}, {100 * interval.high:{form}}]"


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def check_options(options: Any, *rules: tuple[str, bool, str]) -> None:
    """Raise OptionError for the first broken rule (field, whether it holds, what is expected)."""
    for name, holds, expected in rules:
        if not holds:
            found = getattr(options, name)
            raise OptionError(f"{flag_of(name)}: expected {expected}; found {found!r}")


def run_recipe(
    module: str,
    kind: type[Options],
    run: Callable[[Options], tuple[str, Mapping[str, Any]]],
    arguments: Sequence[str] | None,
) -> int:
    """Read the options, run, print the table and write ``--output``; return the exit status.

    Args:
        module: The name of the recipe's module, run by ``python -m``.
        kind: The dataclass of its options, which include ``threads`` and ``output``.
        run: A function from the options to the text to print and the content of the JSON file.
            Its docstring is the description in ``--help``.
        arguments: The command line. None means that of this process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    assert run.__doc__ is not None
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=run.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    build_parser(parser, kind, preset=False)
    values = vars(parser.parse_args(given))
    threads = torch.get_num_threads()

    def command() -> None:
        options: Any = resolve(kind, values)
        if options.output is not None:
            check_writable("--output", Path(options.output))
        torch.set_num_threads(options.threads or threads)
        started = time.perf_counter()
        text, content = run(options)
        print(text)
        if options.output is not None:
            report = {
                "command": " ".join(["python -m", module, *given]),
                "options": asdict(options),
                "environment": environment(),
                "wall_seconds": time.perf_counter() - started,
                **content,
            }
            write_json(Path(options.output), _rounded(report))

    try:
        return reported(module, command)
    finally:
        torch.set_num_threads(threads)


def _rounded(content: Any) -> Any:
    """Return the content with six significant digits, and intervals as dicts."""
    if isinstance(content, Interval):
        content = content._asdict()
    if isinstance(content, float):
        return float(f"{content:.6g}")
    if isinstance(content, Mapping):
        return {key: _rounded(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_rounded(value) for value in content]
    return content
