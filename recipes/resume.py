"""Where a run starts: at the beginning, in a new directory, or where it was interrupted."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from bilevel import BilevelState
from bilevel.random_state import capture
from recipes.checkpoints import Checkpoints, Progress
from recipes.identity import identity
from recipes.options import LowerOptions, OptionError, to_yaml
from recipes.run_directory import create_run_directory, free_directory, write_text


def open_run(
    options: LowerOptions, model: torch.nn.Module, state: BilevelState
) -> tuple[Path, Checkpoints, Progress]:
    """The run directory, its checkpoints, and where the run stands.

    A new run gets a new directory. A resumed one keeps its own: what was logged after the newest
    checkpoint is dropped (those steps are taken again), and so is a model that was saved already;
    ``args.yaml`` says what the run goes on with.

    Args:
        options: of the run.
        model: as it is before the first step.
        state: before the first step.

    Raises:
        OptionError: the directory of a new run holds something; there is nothing to resume, or it
            is of another run.
    """
    if options.resume is None:
        directory = free_directory(Path(options.output_dir), options.on_existing)
        create_run_directory(directory, options)
        start = Progress(state, capture(state.lower_params), {})
        return directory, _checkpoints(options, directory, model), start
    directory = Path(options.resume)
    if (directory / "results.json").exists():
        raise OptionError(f"--resume {directory}: the run is complete, it has its results.json")
    checkpoints = _checkpoints(options, directory, model)
    start = checkpoints.newest(state)
    steps = int(start.state.lower_steps)
    cut_log(directory / "log.jsonl", steps)
    for saved in (directory / "model", *directory.glob(".model.*.unfinished")):
        shutil.rmtree(saved, ignore_errors=True)
    write_text(directory / "args.yaml", to_yaml(replace(options, resume=None)))
    print(f"{directory}: resumed after {steps} of {options.steps} lower steps")
    return directory, checkpoints, start


def _checkpoints(options: LowerOptions, directory: Path, model: torch.nn.Module) -> Checkpoints:
    needed = options.save_every > 0 or options.resume is not None
    return Checkpoints(
        directory / "checkpoints",
        every=options.save_every,
        keep=options.keep_checkpoints,
        identity=identity(options, model) if needed else {},
    )


def cut_log(path: Path, steps: int) -> None:
    """Drop the lines of ``log.jsonl`` after ``steps``, and a last line that was cut short."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if entry["step"] > steps:
            break
        kept.append(line + "\n")
    write_text(path, "".join(kept))
