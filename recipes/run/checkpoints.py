"""Checkpoints of a run: they hold all that it needs to resume as if nothing had interrupted it.

``checkpoints/step-<n>/`` holds, after n lower steps,

* ``state.safetensors``: the state of both levels (parameters, optimizers, the memory of the
  hypergradient, counts) and torch's random states;
* ``run.json``: n, the identity of the run (options, digests of model and data), what happened since
  the last line of ``log.jsonl``, the troubles so far, and the scores of the dev set, if any.

Of a run over shards (``--sharding full``) every rank writes its part: the state is in ``shards/``
(``bilevel.save_shards``), whose seal is sealed again by ``run.json``, and the random states are in
``random.safetensors``. It goes on with any number of processes. A checkpoint that is due is written
from a copy while training goes on, one at a time.

The order of the data, the schedules and the visits are functions of the step and are not stored. A
checkpoint is either complete or absent (``recipes.run.files.complete_directory``). The oldest
checkpoints are removed only after the new one is complete.

With a hypergradient through a window of several lower steps, training cannot resume from a state
within the window: a checkpoint that is due there is written at the end of the window.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bilevel import (
    BilevelState,
    RankError,
    Replicas,
    Saving,
    ShardedModule,
    load_shards,
    save_shards,
    saving_shards,
    tree,
)
from bilevel.autodiff.random_state import RandomState
from bilevel.shards.checkpoint import SEAL
from prm.digests import digest_file
from recipes.options.values import OptionError
from recipes.run.errors import WriteError
from recipes.run.files import (
    complete_directory,
    remove_directory,
    remove_unfinished,
    write_text,
)
from recipes.run.identity import differences
from recipes.run.step_log import Unlogged
from recipes.run.trouble import Seen
from recipes.tensor_file import write_tensors

# A count that is not written while it is 0.
_LOWER_SKIPPED = "lower_skipped"

_STATE, _RUN = "state.safetensors", "run.json"
_SHARDS, _RANDOM = "shards", "random.safetensors"


class DevScore(NamedTuple):
    """The score of the dev set after a step (``recipes.train.dev_evaluation``).

    Attributes:
        step: The number of lower steps.
        best_of_n: The best-of-N accuracy.
        file: The SHA-256 of the dev set.
    """

    step: int
    best_of_n: float
    file: str


@dataclass(frozen=True)
class Progress:
    """The part of a run that changes from step to step.

    Attributes:
        state: The state of both levels.
        random: The random states of torch after the step.
        unlogged: The figures, notes and troubles since the last line of the log.
        seen: The troubles of the run so far.
        dev: The scores of the dev set so far.
    """

    state: BilevelState[Any, Any]
    random: RandomState
    unlogged: Unlogged = Unlogged({})
    seen: Seen = Seen({})
    dev: Sequence[DevScore] = ()


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run: where they are, when they are due, and which run they belong to.

    Attributes:
        directory: The directory ``<run directory>/checkpoints``.
        every: The number of lower steps between checkpoints. With 0, none is due.
        keep: The number of newest checkpoints to keep. With 0, all are kept. The newest checkpoint
            that was due is always kept.
        identity: The identity of the run (``recipes.run.identity``).
        shards: What θ is a part of on this rank, None if it is whole. Then every rank saves and
            loads, and rank 0 alone knows the directory and the identity.
        pending: The checkpoint over shards that is being written, one at most.
    """

    directory: Path
    every: int
    keep: int
    identity: Mapping[str, Any]
    shards: ShardedModule | None = None
    pending: dict[Path, Saving] = field(default_factory=dict)

    @property
    def _first(self) -> bool:
        """Whether this rank writes what is not in shards."""
        return self.shards is None or self._ranks.rank == 0

    @property
    def _ranks(self) -> Replicas:
        assert self.shards is not None
        return Replicas(group=self.shards.group)

    def due(self, before: int, after: int) -> bool:
        """Return whether a multiple of ``every`` lies in the steps ``before`` + 1 to ``after``."""
        return self.every > 0 and after // self.every > before // self.every

    def save(self, progress: Progress, *, due: bool = True, aside: bool = False) -> Path:
        """Write a checkpoint, then remove the oldest beyond ``keep``.

        A run has one state at a step, so an existing checkpoint of that step is kept. What an
        earlier call began is finished first.

        Args:
            progress: The state to save.
            due: Whether the checkpoint is due by ``every``. ``--on-trouble rollback`` returns to
                the newest checkpoint that was due.
            aside: Whether, over shards, a copy of the state is written after this has returned:
                see ``finish``. Otherwise writing takes no copy in memory.

        Returns:
            The checkpoint's directory.

        Raises:
            WriteError: A file cannot be written. Complete checkpoints are unchanged.
        """
        path = self.directory / f"step-{int(progress.state.lower_steps)}"
        self.finish()
        with _writable(path):
            if self.shards is not None:
                self._write_shards(path, progress, due, aside)
                return path
            if not path.is_dir():
                self._write(path, progress, due)
            self._remove_oldest(path)
        return path

    def finish(self) -> None:
        """Wait until what ``save`` began is complete; over shards every rank calls this.

        Raises:
            WriteError: A file could not be written. Complete checkpoints are unchanged.
            RankError: Another rank is gone.
        """
        if self.pending:
            path, saving = self.pending.popitem()
            with _writable(path):
                saving.finish()

    def _write(self, path: Path, progress: Progress, due: bool) -> None:
        remove_unfinished(self.directory, "step-*")
        with complete_directory(path) as unfinished:
            digest = write_tensors(unfinished / _STATE, _tensors(progress))
            _write_run(unfinished, self._described(progress, due), digest)

    def _described(self, progress: Progress, due: bool) -> dict[str, Any]:
        """Return what ``run.json`` says of a checkpoint."""
        content = {
            "step": int(progress.state.lower_steps),
            "due": due,
            "identity": self.identity,
            "unlogged": asdict(progress.unlogged),
            "seen": asdict(progress.seen),
        }
        if progress.dev:
            content["dev"] = [score._asdict() for score in progress.dev]
        return content

    def _remove_oldest(self, newest: Path) -> None:
        """Remove the oldest checkpoints beyond ``keep``, after the newest is complete."""
        if self.keep:
            complete = self._complete()
            stays = {*complete[-self.keep :], next(self._due(), newest)}
            for old in complete:
                if old not in stays:
                    remove_directory(old)

    def _write_shards(self, path: Path, progress: Progress, due: bool, aside: bool) -> None:
        """Write a checkpoint, every rank its shards, unless rank 0 sees that there is one."""
        assert self.shards is not None
        with ExitStack() as stack:
            unfinished = None
            if self._first and not path.is_dir():
                unfinished = stack.enter_context(self._around_shards(path, progress, due))
            unfinished = self._ranks.objects(unfinished)[0]
            if unfinished is None:
                return
            shards = unfinished / _SHARDS
            if aside:
                saving = saving_shards(shards, self.shards, progress.state, stack.pop_all())
                self.pending[path] = saving
            else:
                save_shards(shards, self.shards, progress.state)

    @contextmanager
    def _around_shards(self, path: Path, progress: Progress, due: bool) -> Iterator[Path]:
        """Let the body write the shards, while training may go on, and complete the checkpoint."""
        content = self._described(progress, due)
        remove_unfinished(self.directory, "step-*")
        with complete_directory(path) as unfinished:
            yield unfinished
            write_tensors(unfinished / _RANDOM, _of_generators(progress.random))
            _write_run(unfinished, content, _digest_of(unfinished))
        self._remove_oldest(path)

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint, if any."""
        return next(reversed(self._complete()), None)

    def newest_due(self) -> Path | None:
        """Return the newest complete checkpoint that was due, if any."""
        return next(self._due(), None)

    def named(self, steps: int) -> Path:
        """Return the checkpoint after ``steps`` lower steps.

        Raises:
            OptionError: The checkpoint does not exist or is not complete.
        """
        path = self.directory / f"step-{steps}"
        if not path.is_dir():
            there = ", ".join(p.name for p in self._complete()) or "none"
            raise OptionError(f"--resume {path}: no complete checkpoint (there are: {there})")
        return path

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, in order."""
        return [_steps(path) for path in self._complete()]

    def remove_after(self, steps: int) -> list[str]:
        """Remove the checkpoints after more than ``steps`` lower steps, and return their names."""
        later = [path for path in self._complete() if _steps(path) > steps]
        for path in later:
            remove_directory(path)
        return [path.name for path in later]

    def load(
        self, path: Path, example: BilevelState[Any, Any], *, in_place: bool = False
    ) -> Progress:
        """Read a checkpoint onto the devices of ``example``.

        Args:
            path: The checkpoint's directory.
            example: A state of this run, for its structure, for example ``solver.init(...)``.
            in_place: Whether the state is read into the tensors of ``example``.

        Raises:
            OptionError: The checkpoint cannot be read, it has changed since it was written, or it
                belongs to another run. The message lists the differences.
        """
        with _readable(path):
            run = json.loads((path / _RUN).read_text(encoding="utf-8"))
            if run.pop("sha256") != _seal(_digest_of(path), run):
                raise ValueError("something in it is not as it was written")
            different = differences(run["identity"], self.identity)
        if different:
            raise OptionError(
                f"--resume: {path} is of another run: {'; '.join(different)}. Give the run's own "
                "options and files, or start a new run in another directory"
            )
        with _readable(path):
            dev = tuple(DevScore(**score) for score in run.get("dev", ()))
            told = Unlogged(**run["unlogged"]), Seen(**run["seen"]), dev
            if self.shards is not None:
                random = _generators(load_file(path / _RANDOM), example)
                return Progress(self.load_shards(path, example), random, *told)
            tensors = load_file(path / _STATE)
            try:
                state, random = _levels_and_random(tensors, example, in_place)
            except ValueError as error:
                raise OptionError(f"--resume: {path}: {error}") from error
            return Progress(state, random, *told)

    def load_shards(
        self, path: Path | None, state: BilevelState[Any, Any]
    ) -> BilevelState[Any, Any]:
        """Read a state over shards in place; all ranks call this, and rank 0 names the checkpoint.

        Args:
            path: The checkpoint that rank 0 found good; None: there is none, or another rank calls.
            state: A state of this run.

        Raises:
            OptionError: The shards are not as they were written, or those of another model, or
                cannot be read. All ranks say so.
        """
        assert self.shards is not None
        told = self._ranks.objects(path)[0]
        if told is None:
            return state
        with _readable(told):
            return load_shards(told / _SHARDS, self.shards, state)

    def _due(self) -> Iterator[Path]:
        """Yield the directories of complete checkpoints that were due, newest first."""
        for path in reversed(self._complete()):
            with suppress(OptionError), _readable(path):
                if json.loads((path / _RUN).read_text(encoding="utf-8"))["due"]:
                    yield path

    def _complete(self) -> list[Path]:
        """Return the directories of complete checkpoints, oldest first."""
        paths = [p for p in self.directory.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
        return sorted(paths, key=_steps)


def _write_run(unfinished: Path, content: Mapping[str, Any], digest: str) -> None:
    sealed = {**content, "sha256": _seal(digest, content)}
    write_text(unfinished / _RUN, json.dumps(sealed, indent=1, ensure_ascii=False) + "\n")


def _digest_of(path: Path) -> str:
    """Return the SHA-256 of the state's file, or over shards of the files that stand for it."""
    if not (path / _SHARDS).is_dir():
        return digest_file(path / _STATE)
    files = (path / _SHARDS / SEAL, path / _RANDOM)
    return hashlib.sha256("".join(map(digest_file, files)).encode()).hexdigest()


def _seal(digest: str, content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the digest of the state's file and of all else in ``run.json``.

    A bit that a disk or a copy has changed is then an error and does not change the run silently.
    """
    text = digest + json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Turn an error of writing a checkpoint into a ``WriteError``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise WriteError(f"{path}: cannot be written ({error})") from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn any error of reading a checkpoint into an ``OptionError``."""
    try:
        yield
    except (OptionError, RankError):  # that a rank is gone is no fault of the checkpoint
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        reason = f"{type(error).__name__} {error}" if isinstance(error, LookupError) else error
        raise OptionError(
            f"--resume: {path} cannot be read ({reason}); remove it to go on from the "
            "checkpoint before it"
        ) from error
    except (RecursionError, RuntimeError) as error:
        raise OptionError(f"--resume: {path} cannot be read ({error}); remove it") from error


def _steps(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _tensors(progress: Progress) -> dict[str, Tensor]:
    state = tree.flatten(progress.state)
    if (
        not progress.state.lower_skipped
    ):  # as in checkpoints of version 0.1, which has no such count
        del state[_LOWER_SKIPPED]
    parts = {"state": state, "random": _of_generators(progress.random)}
    return {
        f"{part}/{name}": tensor
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }


def _of_generators(random: RandomState) -> dict[str, Tensor]:
    return {"cpu": random.cpu} | {str(device): state for device, state in random.devices}


def _generators(tensors: Mapping[str, Tensor], example: BilevelState[Any, Any]) -> RandomState:
    random = {name: tensor.clone() for name, tensor in tensors.items()}
    cpu = random.pop("cpu")
    here = {str(leaf.device) for leaf in tree.leaves(example)}  # the run may have moved
    devices = {torch.device(name): state for name, state in random.items() if name in here}
    return RandomState(cpu, tuple(devices.items()))


def _levels_and_random(
    tensors: Mapping[str, Tensor], example: BilevelState[Any, Any], in_place: bool
) -> tuple[BilevelState[Any, Any], RandomState]:
    parts: dict[str, dict[str, Tensor]] = {"state": {}, "random": {}}
    for path, tensor in tensors.items():
        part, _, name = path.partition("/")
        parts[part][name] = tensor
    parts["state"].setdefault(_LOWER_SKIPPED, torch.zeros_like(example.lower_skipped))
    # Tensors are copied into memory that torch aligns, because sums may depend on the alignment.
    state = tree.map(
        lambda like, tensor: (like if in_place else torch.empty_like(like)).copy_(tensor),
        example,
        tree.unflatten(parts["state"], example),
    )
    return state, _generators(parts["random"], example)
