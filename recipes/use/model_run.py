"""The run that a model or weighting lies in, and whether the model is used as it was trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from recipes.options.base import PrmOptions
from recipes.options.yaml_file import read_yaml

_PROMPT = ("system_prompt", "context", "max_patches")


def run_of(directory: str) -> dict[str, Any]:
    """The options of the run that ``directory`` lies in; empty where there is no args.yaml.

    Raises:
        OptionError: An args.yaml that cannot be read.
    """
    path = Path(directory).parent / "args.yaml"
    if not path.is_file():
        return {}
    return read_yaml(path)


def prompt_differences(options: PrmOptions, directory: str) -> list[str]:
    """Options of the prompt that are not those of the run, in words."""
    run = run_of(directory)
    lines = []
    for name in _PROMPT:
        if name in run and run[name] != getattr(options, name):
            flag = f"--{name.replace('_', '-')}"
            lines.append(f"{flag} {getattr(options, name)} (the run: {run[name]})")
    return lines


def note_differences(options: PrmOptions, directory: str) -> None:
    """Say on standard error that a model is asked in another way than it was trained to answer."""
    lines = prompt_differences(options, directory)
    if lines:
        print(
            f"note: {Path(directory).parent / 'args.yaml'} has another prompt: {'; '.join(lines)}",
            file=sys.stderr,
        )
