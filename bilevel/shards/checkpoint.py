"""Checkpoints of a state over shards, by ``torch.distributed.checkpoint``.

A checkpoint is a folder: safetensors files, of which each rank writes its own, and ``seal.json``
with the SHA-256 of each of them. It is written under another name and renamed when it is sealed, so
that it is either complete or absent. Any number of ranks reads it, each what its shards hold.

The files of ``torch.distributed.checkpoint``'s own format are not used: they are pickles, and to
read one is to run what it says.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from bilevel import tree
from bilevel.replicas import called
from bilevel.shards.module import ShardedModule
from bilevel.tree import TreeT

SEAL = "seal.json"
"""Name of the file that holds the digests of the others."""


def save_shards(path: Path, module: ShardedModule, state: Any) -> None:
    """Write a state, every rank its shards; no copy of it is made.

    The random state is not part of it: ranks that draw numbers of their own (dropout) have one
    each, and another number of ranks has others.

    Args:
        path: The folder, which all ranks see and which does not exist yet.
        module: What ``sharded(module)`` returned.
        state: A ``BilevelState`` of ``ResidentSolver``.

    Raises:
        FileExistsError: There is such a folder.
        OSError: A file cannot be written. Then there is no folder of this name.
    """
    unfinished = _begin(path, module)
    _write(path, unfinished, tree.flatten(module.distributed(state)), module.group)


class Saving:
    """A checkpoint that is being written while training goes on; made by ``saving_shards``."""

    def __init__(self, write: Callable[[], None], group: dist.ProcessGroup) -> None:
        self._error: BaseException | None = None
        self._group = group

        def run() -> None:
            try:
                write()
            except BaseException as error:  # raised by finish, in the thread that asks
                self._error = error

        self._thread = Thread(target=run, name="checkpoint")
        self._thread.start()

    def finish(self) -> None:
        """Wait until the checkpoint is complete; every rank must call it, once.

        Raises:
            OSError: A file could not be written. Then there is no checkpoint.
            RankError: Another rank is gone; likewise.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        dist.destroy_process_group(self._group)


def saving_shards(
    path: Path,
    module: ShardedModule,
    state: Any,
    within: AbstractContextManager[object] | None = None,
) -> Saving:
    """Copy a state to the memory of the host, and begin to write the copy.

    Steps may be taken meanwhile: what is written is the state as it was. The copy is as large as
    this rank's shards of θ, moments and average together, and is freed when it is written. The
    writing speaks over a process group of its own.

    Args:
        path: As of ``save_shards``.
        module: Likewise.
        state: Likewise.
        within: A context in which this rank writes; it is entered and left by the thread that does.

    Raises:
        FileExistsError: There is such a folder.
    """
    unfinished = _begin(path, module)
    ranks = dist.get_process_group_ranks(module.group)
    group = dist.new_group(ranks, backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    copy = module.distributed(tree.map(_on_host, state))

    def write() -> None:
        with within or nullcontext():
            _write(path, unfinished, tree.flatten(copy), group)

    return Saving(write, group)


def load_shards(path: Path, module: ShardedModule, state: TreeT) -> TreeT:
    """Read a checkpoint into the tensors of a state, and so into the module; every rank its shards.

    Args:
        path: The folder.
        module: What ``sharded(module)`` returned, on as many ranks as there are now.
        state: ``solver.init(...)``; its tensors change.

    Returns:
        The state.

    Raises:
        ValueError: A file is not as it was written, or the checkpoint is of another model,
            optimizer or precision; nothing has changed then.
        OSError: There is no such checkpoint.
    """
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    sealed = json.loads((path / SEAL).read_text(encoding="utf-8")).get("files", {})
    found = _gathered(_digests(path, module.group), module.group)
    changed = sorted(n for n in {*found, *sealed} if found.get(n) != sealed.get(n))
    if changed:
        raise ValueError(f"{path}: {changed[0]} is not as it was written; take another checkpoint")
    wanted = tree.flatten(module.distributed(state))
    metadata: Any = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    saved = {name: (one.properties.dtype, one.size) for name, one in metadata.items()}
    here = {name: (leaf.dtype, leaf.shape) for name, leaf in wanted.items()}
    different = [name for name in {*saved, *here} if saved.get(name) != here.get(name)]
    if different:
        name = min(different)
        raise ValueError(
            f"{path}: {name!r} is {_told(saved.get(name))} in the checkpoint and "
            f"{_told(here.get(name))} here: was it saved with another model, optimizer or "
            "precision?"
        )
    with torch.no_grad(), _as_os_error(path):
        called(
            lambda: state_dict_loader.load(
                dict(wanted),
                storage_reader=HuggingFaceStorageReader(str(path)),
                process_group=module.group,
            )
        )
    return state


def _begin(path: Path, module: ShardedModule) -> Path:
    """Return the folder to write in, which is new and empty.

    Raises:
        FileExistsError: The checkpoint exists.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    there = path.exists()
    _agree(module.group)  # before any rank creates it
    if there:
        raise FileExistsError(f"{path} exists; a checkpoint over shards needs a new folder")
    if dist.get_rank(module.group) == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    _agree(module.group)
    return unfinished


def _write(
    path: Path, unfinished: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup
) -> None:
    """Write and seal, and give the folder its name."""
    from torch.distributed.checkpoint import state_dict_saver
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    with _as_os_error(path):
        called(
            lambda: state_dict_saver.save(
                dict(tensors),
                storage_writer=HuggingFaceStorageWriter(str(unfinished), save_distributed=True),
                process_group=group,
            )
        )
    files = _gathered(_digests(unfinished, group), group)
    if dist.get_rank(group) == 0:
        text = json.dumps({"files": files}, indent=1, sort_keys=True)
        (unfinished / SEAL).write_text(text + "\n", encoding="utf-8")
        unfinished.rename(path)
    _agree(group)


@contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """Turn the error of ``torch.distributed.checkpoint``, which is no ``Exception``, into one."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        first = next((f"rank {rank}: {one[0]}" for rank, one in error.failures.items()), error)
        raise OSError(f"{path}: the checkpoint cannot be written or read ({first})") from error


def _digests(folder: Path, group: dist.ProcessGroup) -> dict[str, str]:
    """Return the digests of this rank's share of the files, which all ranks see."""
    names = sorted(file.name for file in folder.iterdir() if file.name != SEAL)
    found = {}
    for name in names[dist.get_rank(group) :: dist.get_world_size(group)]:
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _gathered(own: Mapping[str, str], group: dist.ProcessGroup) -> dict[str, str]:
    parts: list[Any] = [None] * dist.get_world_size(group)
    called(lambda: dist.all_gather_object(parts, dict(own), group=group))
    return {name: digest for part in parts for name, digest in part.items()}


def _agree(group: dist.ProcessGroup) -> None:
    """Wait for all ranks."""
    _gathered({}, group)


@torch.no_grad()
def _on_host(leaf: Tensor) -> Tensor:
    return leaf.detach().to("cpu", copy=True)


def _told(kind: tuple[torch.dtype, torch.Size] | None) -> str:
    return "missing" if kind is None else f"{kind[0]} {tuple(kind[1])}"
