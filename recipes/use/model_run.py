"""The run of a model or weighting, and whether the model is used as it was trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from recipes.options.base import PrmOptions, flag_of
from recipes.options.parse import saved_options

_PROMPT = ("system_prompt", "context", "max_patches")


def run_of(directory: str) -> dict[str, Any]:
    """Return the options of the run that holds ``directory``; none without an args.yaml.

    Raises:
        OptionError: The args.yaml cannot be read.
    """
    run = Path(directory).parent
    return saved_options(run) if (run / "args.yaml").is_file() else {}


def prompt_differences(options: PrmOptions, directory: str) -> list[str]:
    """Return the options of the prompt that differ from those of the run, in words."""
    run = run_of(directory)
    lines = []
    for name in _PROMPT:
        if name in run and run[name] != getattr(options, name):
            lines.append(f"{flag_of(name)} {getattr(options, name)} (the run: {run[name]})")
    return lines


def note_differences(options: PrmOptions, directory: str) -> None:
    """Warn on standard error if the prompt differs from that of the model's training."""
    lines = prompt_differences(options, directory)
    if lines:
        print(
            f"note: {Path(directory).parent / 'args.yaml'} has another prompt: {'; '.join(lines)}",
            file=sys.stderr,
        )
