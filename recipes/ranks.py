"""The ranks of a command: processes that ``torchrun`` or ``accelerate launch`` started together.

Both set ``RANK`` and ``WORLD_SIZE``, and where the processes meet. Every rank runs the whole
command on its part of the batches (``bilevel.Replicas``); rank 0 alone prints, logs and saves. The
others say nothing, and what they would write goes to a folder that is removed when they end.

A rank that fails tells the others, and all end together once rank 0 has saved. One that is killed
closes its connections, which ends the others at their next exchange; one that hangs is given up
after the half hour of torch's own process groups.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.options.values import OptionError

if TYPE_CHECKING:
    from bilevel import Collective
    from bilevel.tree import Tree

_COMMANDS = ("cold-start", "train", "score", "evaluate", "weigh")


def share(count: int, rank: int, ranks: int) -> range:
    """Return the part of ``count`` things in a row that a rank takes.

    The parts of all ranks, one after the other, are the whole, and differ by one thing at most.
    """
    return range(rank * count // ranks, (rank + 1) * count // ranks)


def ranks_here() -> Collective:
    """Return what joins this process with the other ranks of the command: ``Alone`` with none."""
    from torch import distributed

    from bilevel import Alone, Replicas

    joined = distributed.is_available() and distributed.is_initialized()
    return Replicas() if joined and distributed.get_world_size() > 1 else Alone()


def several_ranks() -> bool:
    """Return whether the environment says that several processes run the command."""
    return _number("WORLD_SIZE", 1) > 1


def is_first() -> bool:
    """Return whether this process is rank 0, which speaks for all."""
    named = os.environ.get
    return named("WORLD_SIZE", "1") == "1" or named("RANK", "0") == "0"


@contextmanager
def over_ranks(command: str) -> Iterator[Path | None]:
    """Join the ranks that run a command while the body runs.

    At its end all wait for each other, unless the body is interrupted, has left, or a process is
    gone.

    Yields:
        A folder for what this rank would write, None for rank 0 and a process alone.

    Raises:
        OptionError: The command runs in one process, or the environment does not say how the ranks
            meet.
    """
    ranks = _number("WORLD_SIZE", 1)
    if ranks <= 1:
        yield None
        return
    if command not in _COMMANDS:
        raise OptionError(
            f"WORLD_SIZE={ranks}: this command runs in one process; start it without torchrun "
            f"(several run {', '.join(_COMMANDS)})"
        )
    _join(ranks)
    from torch import distributed

    from bilevel import RankError

    try:
        if distributed.get_rank() == 0:
            yield None
        else:
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder)
        if distributed.is_initialized():
            with suppress(RankError):
                ranks_here().numbers(0)  # until rank 0 has saved: who ends first ends the others
    finally:
        leave()


def leave() -> None:
    """Leave the ranks of the command, if there are any."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def group_of_one() -> Iterator[None]:
    """Let a process that is alone be a group of ``torch.distributed`` while the body runs."""
    from torch import distributed

    if distributed.is_initialized():
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        there = f"file://{folder}/ranks"
        distributed.init_process_group("gloo", init_method=there, rank=0, world_size=1)
        try:
            yield
        finally:
            leave()


@contextmanager
def own_random_numbers(ranks: Collective, params: Tree, step: int) -> Iterator[None]:
    """Let the body draw random numbers of this rank's own (dropout); alone, those of the process.

    They are a function of the generators' state, the step and the rank. The generators themselves
    stay as they are, the same on all ranks, so that a checkpoint has one random state whatever the
    number of ranks.
    """
    if ranks.ranks == 1:
        yield
        return
    import torch

    from bilevel.autodiff.random_state import capture, restore

    shared = capture(params)
    generator = torch.Generator()
    generator.set_state(shared.cpu)
    drawn = torch.randint(2**40, (), generator=generator)
    torch.manual_seed((int(drawn) << 20) + step * ranks.ranks + ranks.rank)
    try:
        yield
    finally:
        restore(shared)


def lost(error: BaseException | None) -> bool:
    """Return whether an error comes from a rank that is gone: no other rank will tell of it."""
    from bilevel.collective import causes

    return any(getattr(one, "gone", False) for one in causes(error))


def _join(ranks: int) -> None:
    from torch import cuda, distributed

    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise OptionError(
            f"WORLD_SIZE={ranks}, without {', '.join(missing)}: start the ranks by torchrun "
            f"--nproc-per-node {ranks} -m recipes ..., or unset WORLD_SIZE"
        )
    gpus = distributed.is_nccl_available() and one_gpu_each(cuda.device_count())
    distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")


def one_gpu_each(count: int) -> bool:
    """Leave each process of this machine a GPU of its own to see, or none where there are too few.

    CUDA reads ``CUDA_VISIBLE_DEVICES`` when it is first used, which must come after this. The GPU
    of a rank is then ``cuda``, the only one that it has.

    Args:
        count: The number of GPUs that are visible so far.

    Returns:
        Whether there is one for each.
    """
    if not count:
        return False
    here = _number("LOCAL_WORLD_SIZE", _number("WORLD_SIZE", 1))
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    enough = count >= here
    own = names.split(",")[_number("LOCAL_RANK", _number("RANK", 0))] if enough else ""
    os.environ["CUDA_VISIBLE_DEVICES"] = own
    if not enough and is_first():
        text = f"note: {here} processes on this machine and {count} GPU: computing on the CPU"
        print(text, file=sys.stderr)
    return enough


def _number(name: str, default: int) -> int:
    """Return a number of the environment.

    Raises:
        OptionError: It is none.
    """
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise OptionError(f"{name}={text}: expected a number, as torchrun sets it; unset it")
    return int(text)


@contextmanager
def silent_unless_first() -> Iterator[None]:
    """Let nothing that the body prints be seen, except on rank 0."""
    if is_first():
        yield
        return
    with ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        stack.enter_context(redirect_stdout(nowhere))
        stack.enter_context(redirect_stderr(nowhere))
        yield


def say_aloud(text: Any) -> None:
    """Print a line on the standard error of this rank, which says so, silenced or not."""
    with suppress(OSError, AttributeError):
        print(f"rank {os.environ.get('RANK', 0)}: {text}", file=sys.__stderr__, flush=True)
