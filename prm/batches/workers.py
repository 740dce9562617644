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
    """Yield ``make(n)`` of every number, in order. The results do not depend on ``workers``.

    With workers, ``torch.utils.data.DataLoader`` runs ``make`` in that many forked processes, each
    two numbers ahead. A process holds a tile cache of its own, but no copy of the data, whose
    memory fork shares. ``make`` must depend on its number alone: its side effects and random
    numbers remain in its process. The random state of this process does not change.

    Raises:
        DataError: ``make`` raised it, or a process died. It is raised in the order of the results.
        ValueError: ``make`` raised it, or this system cannot fork processes.
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
            generator=torch.Generator(),  # Without it a seed is drawn from the global random state.
        )
    iterator: Iterator[Any] | None = None
    result: Any = None
    died = ""
    try:
        # A process may die before all are started, so starting them is inside the try, too.
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
        # The iterator is deleted here, while its queues work: an error keeps this frame alive in a
        # cycle, and if the garbage collector deletes the iterator, its processes never end.
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
    """Suppress two warnings while processes start.

    The caller chooses the number of processes, so torch's warning of too many does not apply. The
    processes use no threads, so Python 3.12's warning of a fork beside threads does not, either.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@dataclass(frozen=True)
class _Failed:
    """The error of a failed computation, returned as a result since DataLoader would change it."""

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
    """Ignore Ctrl-C, which the whole process group receives and the main process handles."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
