"""Batches made ahead of time by other processes: images are decoded while the model computes."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from prm.schema import DataError

Made = TypeVar("Made")


def made_in_order(
    make: Callable[[int], Made], numbers: Sequence[int], workers: int = 0
) -> Iterator[Made]:
    """``make(n)`` of every number, in order; what comes out does not depend on ``workers``.

    With workers ``torch.utils.data.DataLoader`` runs ``make`` in that many forked processes, two
    numbers ahead each. They hold what they read (a tile cache each), not a copy of the data, which
    fork shares. ``make`` must be a function of its number: what it changes or draws at random stays
    in its process. The random state of this process is left alone.

    Raises:
        DataError: Of ``make``, in its turn; or a process that died.
        ValueError: Of ``make``; or no processes can be forked on this system.
    """
    if not workers:
        yield from map(make, numbers)
        return
    if not hasattr(signal, "SIGCHLD"):
        raise ValueError("expected workers 0: this system cannot fork processes")
    with warnings.catch_warnings():
        # How many there are is the caller's decision; and a worker uses no threads, next to which
        # Python 3.12 warns of forking.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        loader: DataLoader[Any] = DataLoader(
            _Numbered(make),
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_interrupts,
            multiprocessing_context="fork",
            generator=torch.Generator(),  # else a seed is drawn from the global random state
        )
        iterator = iter(loader)
    try:
        for made in iterator:
            if isinstance(made, _Failed):
                raise made.error
            yield made
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            expected="batches from the loader processes",
            found=" ".join(str(error).split()),
            remedy="out of memory, or a file that a decoder dies of: use fewer workers; with "
            "workers 0 the process itself shows where",
        ) from error


@dataclass(frozen=True)
class _Failed:
    """In the place of what could not be made: DataLoader would not raise the error as it was."""

    error: Exception


class _Numbered(Dataset[Any]):
    def __init__(self, make: Callable[[int], Any]) -> None:
        self._make = make

    def __getitem__(self, number: int) -> Any:
        try:
            return self._make(number)
        except Exception as error:
            return _Failed(error)


def _as_it_is(made: Made) -> Made:
    return made


def _leave_interrupts(worker: int) -> None:
    """Ctrl-C goes to the whole group of processes; what it means is the main process's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
