"""``bilevel-prm runs``: the state of a run and how to resume it, without importing torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from recipes.options.base import option
from recipes.options.parse import command_of
from recipes.options.values import OptionError
from recipes.options.yaml_file import read_yaml
from recipes.run.directory import resume_command
from recipes.run.lock import at_work
from recipes.terminal import printable, say

State = Literal["complete", "at work", "stopped"]


@dataclass(frozen=True, kw_only=True)
class RunsFlags:
    """Options of both ``bilevel-prm runs`` commands."""

    json: bool = option(False, "print JSON")


@dataclass(frozen=True, kw_only=True)
class RunsShowOptions(RunsFlags):
    """Options of ``bilevel-prm runs show``, which describes one run."""

    directory: str = option(..., "run directory")


@dataclass(frozen=True, kw_only=True)
class RunsListOptions(RunsFlags):
    """Options of ``bilevel-prm runs list``, which lists all runs below a folder."""

    directory: str = option("runs", "folder to look in")


@dataclass(frozen=True)
class RunState:
    """The state of a run.

    Attributes:
        directory: The run directory.
        kind: The command that started it, "cold-start" or "train".
        state: "complete" (it has its results), "at work" (a process holds its lock), or
            "stopped".
        steps: The number of lower steps of the whole run.
        logged: The step of the last complete line of the log, 0 if there is none.
        last_line: The last complete line of the log, None if there is none.
        checkpoint: The step of the newest complete checkpoint, None if there is none.
        resume: The command that resumes the run, None for a complete run.
        results: The ``rows`` of ``results.json``, None if there are no results.
        environment: The content of ``env.json``.
    """

    directory: str
    kind: str
    state: State
    steps: int
    logged: int
    last_line: Mapping[str, Any] | None
    checkpoint: int | None
    resume: str | None
    results: Mapping[str, Any] | None
    environment: Mapping[str, Any]


def run_state(directory: Path) -> RunState:
    """Read the state of a run from the files in its directory.

    Raises:
        OptionError: The directory holds no run.
    """
    if not (directory / "args.yaml").is_file():
        raise OptionError(f"{directory}: expected a run directory, found no args.yaml in it")
    # The lock is read first: a run that ends after that has written its results by then.
    working = at_work(directory)
    args = read_yaml(directory / "args.yaml")
    kind = command_of(args)
    results = json_object(directory / "results.json")
    line = _last_line(directory / "log.jsonl")
    logged = (line or {}).get("step", 0)
    state: State = "stopped"
    if results is not None:
        state = "complete"
    elif working:
        state = "at work"
    return RunState(
        directory=str(directory),
        kind=kind,
        state=state,
        steps=args["steps"] if isinstance(args.get("steps"), int) else 0,
        logged=logged if isinstance(logged, int) else 0,
        last_line=line,
        checkpoint=_newest_checkpoint(directory / "checkpoints"),
        resume=None if state == "complete" else resume_command(args, directory),
        results=None if results is None else results.get("rows", {}),
        environment=json_object(directory / "env.json") or {},
    )


def runs_below(root: Path) -> list[Path]:
    """Return the run directories below ``root``, itself included, by name."""
    return sorted(path.parent for path in root.glob("**/args.yaml"))


def show_run(options: RunsShowOptions) -> None:
    """Print the state of a run."""
    state = run_state(Path(options.directory))
    print(json.dumps(asdict(state), indent=1) if options.json else described(state))


def list_runs(options: RunsListOptions) -> None:
    """Print a line for every run below a folder.

    Raises:
        OptionError: There is no such folder.
    """
    if not Path(options.directory).is_dir():
        raise OptionError(f"{options.directory}: no such folder")
    states = [run_state(path) for path in runs_below(Path(options.directory))]
    if options.json:
        print(json.dumps([asdict(run) for run in states], indent=1))
        return
    for run in states:
        say(f"{run.state:9} {run.logged:>7} of {run.steps:>7}  {run.kind:10} {run.directory}")
    if not states:
        say(f"no runs below {options.directory}")


def described(run: RunState) -> str:
    """Return the state of a run as a few lines of text."""
    lines = [
        f"{run.directory}: {run.kind}, {run.state}",
        f"steps       {run.logged} of {run.steps} logged",
        f"checkpoint  {'none' if run.checkpoint is None else f'after step {run.checkpoint}'}",
    ]
    if run.last_line is not None:
        figures = {k: v for k, v in run.last_line.items() if k not in ("phase", "step")}
        shown = ", ".join(f"{name} {_short(value)}" for name, value in figures.items())
        lines.append(f"last line   {shown}")
    git = run.environment.get("git")
    if isinstance(git, dict):
        lines.append(f"code        {git.get('commit')}{' and changes' if git.get('dirty') else ''}")
    data = run.environment.get("data")
    for name, file in data.items() if isinstance(data, dict) else ():
        if isinstance(file, dict):
            lines.append(f"data        {file.get('path')} ({name}, {file.get('lines')} lines)")
    if run.results:
        lines.append("results     " + ", ".join(f"{k} {_short(v)}" for k, v in run.results.items()))
    if run.resume is not None:
        lost = "" if run.checkpoint is not None else " (from the beginning)"
        lines.append(f"go on with  {run.resume}{lost}")
    return "\n".join(map(printable, lines))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def json_object(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None without a file or a complete object in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _last_line(path: Path) -> dict[str, Any] | None:
    """Return the last complete line of a log. Only its end is read: logs of long runs are large."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2**16))
            lines = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return None
    for line in reversed(lines[:-1]):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            return entry
    return None


def _newest_checkpoint(path: Path) -> int | None:
    names = [entry.name.removeprefix("step-") for entry in path.glob("step-*")]
    return max((int(name) for name in names if name.isdecimal()), default=None)
