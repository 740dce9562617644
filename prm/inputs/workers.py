"""Worker processes that prepare batches ahead: images are decoded while the model computes."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from prm.schema import DataError

Result = TypeVar("Result")


def ordered_map(
    make: Callable[[int], Result], numbers: Sequence[int], workers: int = 0
) -> Iterator[Result]:
    """Yield ``make(n)`` of every number, in order; what comes out does not depend on ``workers``.

    With workers ``torch.utils.data.DataLoader`` runs ``make`` in that many forked processes, two
    numbers ahead each. They hold what they read (a tile cache each), not a copy of the data, which
    fork shares. ``make`` must be a function of its number: what it changes or draws at random stays
    in its process. The random state of this process is left alone.

    Raises:
        DataError: ``make`` raised it, at its turn; or a process died.
        ValueError: ``make`` raised it; or no processes can be forked on this system.
    """
    if not workers:
        yield from map(make, numbers)
        return
    if not hasattr(signal, "SIGCHLD"):
        raise ValueError("expected workers 0: this system cannot fork processes")
    with _without_warnings():
        loader: DataLoader[Any] = DataLoader(
            _Numbered(make),
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=_leave_interrupts,
            multiprocessing_context="fork",
            generator=torch.Generator(),  # otherwise a seed is drawn from the global random state
        )
    iterator: Iterator[Any] | None = None
    result: Any = None
    died = ""
    try:
        # A process may be dead before all are there: starting them is part of this, too.
        with _without_warnings():
            iterator = iter(loader)
        for result in iterator:
            if isinstance(result, _Failed):
                raise result.error
            yield result
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        died = " ".join(str(error).split())
    finally:
        # Deleted here, while its queues work: an error keeps this frame alive in a cycle, and the
        # processes of an iterator that the garbage collector deletes are never told to end.
        iterator = result = None
    if died:
        raise DataError(
            expected="batches from the loader processes",
            found=died,
            remedy="out of memory, or a file that a decoder dies of: use fewer workers; with "
            "workers 0 the process itself shows where",
        )


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence two warnings of starting the processes.

    The caller decides how many processes there are, so torch need not warn of too many. They use no
    threads, so Python 3.12 need not warn of forking beside threads.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@dataclass(frozen=True)
class _Failed:
    """The error of a failed computation, passed as a result because DataLoader would change it."""

    error: Exception


class _Numbered(Dataset[Any]):
    def __init__(self, make: Callable[[int], Any]) -> None:
        self._make = make

    def __getitem__(self, number: int) -> Any:
        try:
            return self._make(number)
        except Exception as error:
            return _Failed(error)


def _unchanged(result: Result) -> Result:
    return result


def _leave_interrupts(worker: int) -> None:
    """Ignore Ctrl-C, which reaches the whole group of processes; the main process handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
