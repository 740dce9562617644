"""``bilevel-prm runs``: what a run was, where it stands, how to go on. Does not import torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from recipes.options.base import option
from recipes.options.values import OptionError
from recipes.options.yaml_file import read_yaml
from recipes.run.lock import at_work

State = Literal["complete", "at work", "stopped"]


@dataclass(frozen=True, kw_only=True)
class RunsFlags:
    """What ``bilevel-prm runs`` prints."""

    json: bool = option(False, "print JSON")


@dataclass(frozen=True, kw_only=True)
class RunsShowOptions(RunsFlags):
    """One run."""

    directory: str = option(..., "run directory")


@dataclass(frozen=True, kw_only=True)
class RunsListOptions(RunsFlags):
    """All runs below a folder."""

    directory: str = option("runs", "folder to look in")


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    Attributes:
        directory: of the run.
        kind: the command that it is of, "cold-start" or "train".
        state: "complete" (it has its results), "at work" (a process holds its lock), or
            "stopped".
        steps: of the whole run.
        logged: step of the last complete line of the log; 0 without one.
        last_line: that line.
        checkpoint: step of the newest complete checkpoint; None: there is none.
        resume: the command that goes on; None for a complete run.
        results: ``rows`` of ``results.json``.
        environment: ``env.json``.
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
    """What the files of a run directory say.

    Raises:
        OptionError: it is none.
    """
    if not (directory / "args.yaml").is_file():
        raise OptionError(f"{directory}: expected a run directory, found no args.yaml in it")
    # Asked first: a run that ends from here on has written its results before it left.
    working = at_work(directory)
    args = read_yaml(directory / "args.yaml")
    kind = "cold-start" if "draw" in args else "train"
    results = _json_object(directory / "results.json")
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
        resume=None if state == "complete" else f"bilevel-prm {kind} --resume {directory}",
        results=None if results is None else results.get("rows", {}),
        environment=_json_object(directory / "env.json") or {},
    )


def runs_below(root: Path) -> list[Path]:
    """Run directories below ``root``, itself included, by name."""
    return sorted(path.parent for path in root.glob("**/args.yaml"))


def show_run(options: RunsShowOptions) -> None:
    """Print where a run stands."""
    found = run_state(Path(options.directory))
    print(json.dumps(asdict(found), indent=1) if options.json else described(found))


def list_runs(options: RunsListOptions) -> None:
    """Print a line for every run below a folder.

    Raises:
        OptionError: there is no such folder.
    """
    if not Path(options.directory).is_dir():
        raise OptionError(f"{options.directory}: no such folder")
    found = [run_state(path) for path in runs_below(Path(options.directory))]
    if options.json:
        print(json.dumps([asdict(run) for run in found], indent=1))
        return
    for run in found:
        print(f"{run.state:9} {run.logged:>7} of {run.steps:>7}  {run.kind:10} {run.directory}")
    if not found:
        print(f"no runs below {options.directory}")


def described(run: RunState) -> str:
    """A run in a few lines."""
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
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _json_object(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is no file, or not (yet) one of an object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _last_line(path: Path) -> dict[str, Any] | None:
    """The last complete line of a log, by its end alone: logs of long runs are large."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2**16))
            lines = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return None
    for line in reversed(lines[:-1]):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    return None


def _newest_checkpoint(path: Path) -> int | None:
    names = [found.name.removeprefix("step-") for found in path.glob("step-*")]
    return max((int(name) for name in names if name.isdigit()), default=None)
