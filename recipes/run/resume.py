"""Open a run: start it in a new directory, or resume it where it was interrupted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError

from bilevel import Alone, BilevelState, Collective, RankError, ShardedModule
from bilevel.autodiff.random_state import RandomState, capture
from bilevel.resident.solver import is_consumed
from recipes.options.flat import flat_options, flatten
from recipes.options.parse import changed, first_folder, to_yaml
from recipes.options.train import LowerOptions
from recipes.options.values import resume_point
from recipes.ranks import ranks_here
from recipes.run.checkpoints import Checkpoints, Progress
from recipes.run.directory import (
    describe_run,
    free_directory,
    make_directory,
    refuse_complete,
    resume_command,
)
from recipes.run.errors import RunError, WriteError, are_agreed
from recipes.run.files import remove_unfinished, write_json, write_text
from recipes.run.identity import identity
from recipes.run.lock import locked
from recipes.run.provenance import environment
from recipes.terminal import say


@dataclass(frozen=True)
class Run:
    """A run that is under way.

    Attributes:
        command: The command that resumes it.
        directory: The run directory.
        checkpoints: The checkpoints of the run.
        beginning: The state before the first step.
        start: The state that training starts from.
        ranks: The ranks that take its steps. Rank 0 alone writes the log and the checkpoints; the
            directory of the others is one of their own, which is removed.
        in_place: Whether its solver is resident.

    With a resident solver ``beginning`` and ``start`` are the one state that there is, whose
    tensors move with it.
    """

    command: str
    directory: Path
    checkpoints: Checkpoints
    beginning: Progress
    start: Progress
    ranks: Collective = Alone()
    in_place: bool = False

    @property
    def writes(self) -> bool:
        """Whether this process writes the log, the checkpoints and the model."""
        return self.ranks.rank == 0

    @property
    def log(self) -> Path:
        """The path of the log, ``log.jsonl``."""
        return self.directory / "log.jsonl"

    def save(self, progress: Progress, *, aside: bool = False) -> None:
        """Save the state; all ranks call this after the same step.

        Args:
            progress: The state.
            aside: Whether, over shards, training goes on while it is written.

        Raises:
            WriteError: As ``Checkpoints.save``.
        """
        if self.writes or self.checkpoints.shards is not None:
            self.checkpoints.save(progress, aside=aside)

    def before_trouble(self) -> Progress:
        """Return the state for ``--on-trouble rollback``.

        It is the state of the newest checkpoint that was due, or else the beginning of the run.
        """
        path = None
        if self.writes:
            path = self.checkpoints.newest_due()
            if path is None and self.in_place:
                path = self.checkpoints.newest()
        back = self.beginning
        if path is not None:
            back = self.checkpoints.load(path, self.start.state, in_place=self.in_place)
        return of_first(back, self.ranks, self.in_place)

    def keep(self, progress: Progress, *, together: bool = False) -> str:
        """Save the state, whether or not a checkpoint is due.

        Args:
            progress: The state.
            together: Whether all ranks are here after the same step. Otherwise a state over shards
                cannot be saved.

        Returns:
            A sentence on where the state is and how to resume. If the state cannot be written, the
            sentence says so, and no error is raised. A state that a failed step has moved on from
            is not written.
        """
        steps, failed = int(progress.state.lower_steps), ""
        saves = self.writes if self.checkpoints.shards is None else together
        if steps > 0 and saves:
            try:
                self.checkpoints.save(progress, due=False)
            except WriteError as error:
                failed = f"{error}; "
        return failed + self._kept()

    def _kept(self) -> str:
        failed = ""
        try:
            self.checkpoints.finish()
        except WriteError as error:
            failed = f"{error}; "
        except RankError:
            pass  # which is what ended this rank, too
        newest = self.checkpoints.newest()
        if not self.writes:
            return f"{failed}go on with: {self.command}"
        kept = "no step is saved" if newest is None else f"the state is in {newest}"
        return f"{failed}{kept}; go on with: {self.command}"

    @contextmanager
    def keeping(self, progress: Progress) -> Iterator[None]:
        """Save ``progress`` if the body fails or is interrupted, and add that to the error."""
        try:
            yield
        except KeyboardInterrupt:
            self.keep(progress)
            raise
        except Exception as error:
            raise self.explained(error, progress) from error

    def explained(self, error: Exception, progress: Progress) -> Exception:
        """Save ``progress``, and return the error with a sentence on that and on how to resume."""
        if isinstance(error, WriteError):  # another attempt would fail, too
            return WriteError(f"{error}; {self._kept()}")
        kept = self.keep(progress, together=are_agreed(error))
        if isinstance(error, RunError):
            return type(error)(f"{error}. After {_steps(progress)}: {kept}")
        if isinstance(error, OSError | SafetensorError | RankError):
            return RunError(f"{error}. After {_steps(progress)}: {kept}")
        error.add_note(f"After {_steps(progress)}: {kept}")
        return error


def of_first(
    progress: Progress, ranks: Collective, in_place: bool, in_shards: bool = False
) -> Progress:
    """Return the progress of rank 0, with the generators of devices as they are on this rank.

    Args:
        progress: That of this rank.
        ranks: The ranks of the run.
        in_place: Whether the state is read into the tensors of ``progress``.
        in_shards: Whether each rank has read its part of the state.
    """
    if ranks.ranks == 1:
        return progress
    state = progress.state
    if not in_shards:
        state = (ranks.adopt if in_place else ranks.first)(state)
    random = RandomState(ranks.first(progress.random.cpu), progress.random.devices)
    told = ranks.objects((progress.unlogged, progress.seen, progress.dev))[0]
    return Progress(state, random, *told)


@contextmanager
def open_run(
    options: LowerOptions,
    model: torch.nn.Module | str,
    state: BilevelState[Any, Any],
    pictures: Mapping[str, Iterable[Path]] = MappingProxyType({}),
    *,
    in_place: bool = False,
    shards: ShardedModule | None = None,
) -> Iterator[Run]:
    """Open a run on all ranks of the command: see ``_opened``, which rank 0 goes through.

    The others get its state and command, and a directory of their own. With ``shards`` they read
    their own parts of a checkpoint.
    """
    ranks = ranks_here()
    with ExitStack() as stack:
        if ranks.rank == 0:
            opened = _opened(options, model, state, pictures, in_place, shards)
            with ranks.together():  # where the others wait for what rank 0 has found
                run = stack.enter_context(opened)
        else:
            directory = Path(stack.enter_context(TemporaryDirectory()))
            every = options.run.save_every
            checkpoints = Checkpoints(directory, every, keep=0, identity={}, shards=shards)
            beginning = Progress(state, capture(state.lower_params))
            if shards is not None and options.run.resume is not None:
                checkpoints.load_shards(None, state)
            run = Run("", directory, checkpoints, beginning, beginning)
        if ranks.ranks > 1:
            command = ranks.objects(run.command)[0]
            start = of_first(run.start, ranks, in_place, shards is not None)
            run = replace(run, command=command, start=start, ranks=ranks)
        yield replace(run, in_place=in_place)


@contextmanager
def _opened(
    options: LowerOptions,
    model: torch.nn.Module | str,
    state: BilevelState[Any, Any],
    pictures: Mapping[str, Iterable[Path]],
    in_place: bool,
    shards: ShardedModule | None,
) -> Iterator[Run]:
    """Open a run, and lock its directory while the body runs.

    A new run gets a new directory. A resumed run keeps its directory: log lines after the
    checkpoint are dropped, because those steps are taken again, and so are later checkpoints and a
    model that was saved already. ``args.yaml`` is written again with the options of the resumed
    run. Without any checkpoint the run starts again from the beginning.

    Args:
        options: The options of the run.
        model: The model before the first step, or its digest.
        state: The state before the first step.
        pictures: The pictures of the files that it trains on, by the flat name of the option.
        in_place: Whether a checkpoint is read into the tensors of ``state``.
        shards: What θ is a part of on each rank, if it is not whole.

    Raises:
        OptionError: The directory of a new run is not empty, another process works in it, the run
            is complete, or the checkpoint does not exist or belongs to another run.
        WriteError: The directory cannot be written.
    """
    if options.run.resume is None:
        directory, steps = free_directory(Path(options.output_dir), options.on_existing), None
    else:
        directory, steps = resume_point(options.run.resume)
    beginning = Progress(state, capture(state.lower_params))
    try:
        make_directory(directory)
        with locked(directory):
            if options.run.resume is None:
                describe_run(directory, options)
            else:
                refuse_complete(directory)
            checkpoints = Checkpoints(
                directory / "checkpoints",
                every=options.run.save_every,
                keep=options.run.keep_checkpoints,
                identity=identity(options, model, pictures),
                shards=shards,
            )
            start = beginning
            if options.run.resume is not None:
                start = _resumed(options, directory, checkpoints, steps, beginning, in_place)
            yield Run(
                resume_command(flat_options(type(options)), directory),
                directory,
                checkpoints,
                beginning,
                start,
            )
    except (OSError, SafetensorError) as error:
        raise WriteError(f"{directory}: {error}") from error


def _resumed(
    options: LowerOptions,
    directory: Path,
    checkpoints: Checkpoints,
    steps: int | None,
    beginning: Progress,
    in_place: bool,
) -> Progress:
    path = checkpoints.newest() if steps is None else checkpoints.named(steps)
    start = beginning
    if path is not None:
        start = checkpoints.load(path, beginning.state, in_place=in_place)
    elif checkpoints.shards is not None:
        checkpoints.load_shards(None, beginning.state)
    where = "no complete checkpoint: from the beginning"
    if path is not None:
        where = f"resumed after {_steps(start)} of {options.lower.steps} lower steps"
    if later := checkpoints.remove_after(int(start.state.lower_steps)):
        where += f"; removed {', '.join(later)}, which come again"
    cut_log(directory / "log.jsonl", int(start.state.lower_steps))
    for written in ("model", "adapter", "last"):
        shutil.rmtree(directory / written, ignore_errors=True)
    remove_unfinished(directory, "*")
    if not (directory / "env.json").exists():
        write_json(directory / "env.json", environment())
    own = changed(options, resume=None, output_dir=str(directory), **_paths(options, directory))
    write_text(directory / "args.yaml", to_yaml(own))
    say(f"{directory}: {where}")
    return start


def _paths(options: LowerOptions, directory: Path) -> dict[str, str]:
    """Return the paths of a run that goes on in another folder than it began in, absolute."""
    if first_folder(directory) in (None, Path.cwd()):
        return {}
    values = flatten(options)
    named = {n: values[n] for n, entry in flat_options(type(options)).items() if entry.path}
    there = {n: path for n, path in named.items() if path is not None and Path(path).exists()}
    return {name: os.path.abspath(path) for name, path in there.items() if path != "embedded"}


def _steps(progress: Progress) -> str:
    if is_consumed(progress.state):
        return "a step that was not completed"
    return f"{int(progress.state.lower_steps)}"


def cut_log(path: Path, steps: int) -> None:
    """Drop the lines of ``log.jsonl`` after ``steps``, and an incomplete last line."""
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
