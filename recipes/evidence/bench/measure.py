"""Peak memory, arithmetic and time of a call.

Memory is the exact number of bytes that torch's CPU allocator reports to its profiler. It includes
every tensor, saved for backward or not, and the temporaries of kernels, and is the same at every
call. Resident memory would include freed blocks that the C library keeps. The scratch space of the
matrix kernels is not allocated by torch and not counted.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from torch._C._autograd import _enable_record_function
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

T = TypeVar("T")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # From glibc's malloc.h.


def with_peak(run: Callable[[], T]) -> tuple[T, int]:
    """Return the result of ``run``, and the peak growth of all tensors in bytes while it ran."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # Otherwise the profiler writes to stderr.
    gc.collect()  # Earlier garbage that is freed while recording would be subtracted.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        # The record of every operation is switched off, since for 64 steps it takes 7 GB.
        _enable_record_function(False)
        try:
            result = run()
        finally:
            _enable_record_function(True)
    profiler: Any = recorded.profiler
    events = profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    alive = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        alive += change
        peak = max(peak, alive)
    return result, peak


class _NoModules(ModuleTracker):
    """Counts everything as one module, without hooks."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def with_flops(run: Callable[[], T]) -> tuple[T, int]:
    """Return the result of ``run``, and the floating-point operations of its matrix products."""
    counter = FlopCounterMode(display=False)
    # Its own tracker of modules hangs hooks on tensors, which forward mode has to refuse.
    counter.mod_tracker = _NoModules()
    with counter:
        result = run()
    return result, int(counter.get_total_flops())


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory for the rest of the process; return whether it can.

    It can with glibc. By default the library returns freed memory at the end of its heap to the
    system, and the next allocation pays for new 4 kB pages one by one: 20,000 pages, a third of a
    forward pass of ``core``'s model, if an iteration's results are freed last. The timed functions
    start from the same state every time and drop their results, which a training loop does not.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(name, 1 << 30) for name in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD))


@dataclass(frozen=True)
class Timed:
    """A function to time in every ``every``-th round."""

    run: Callable[[], object]
    every: int = 1


def in_rounds(
    timed: Mapping[str, Timed],
    rounds: int,
    report: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, float]]:
    """Return, per round, the seconds of every function that was due in it, by ``clock``.

    Each round has one call of each, so that variations in the machine's speed affect all alike, in
    a random order, so that no function always follows the same one. All are due in round 0. Those
    due in every round have one call before it, which is not counted. Garbage in reference cycles is
    collected before each round.
    """
    draw = random.Random(0)
    for one in timed.values():
        if one.every == 1:
            one.run()
    seconds: list[dict[str, float]] = []
    for index in range(rounds):
        seconds.append({})
        gc.collect()
        for name, one in draw.sample(list(timed.items()), len(timed)):
            if index % one.every == 0:
                started = clock()
                one.run()
                seconds[-1][name] = clock() - started
        report(f"round {index + 1} of {rounds}: {sum(seconds[-1].values()):.1f} s")
    return seconds


def median_of(
    rounds: Sequence[Mapping[str, float]], value: Callable[[Mapping[str, float]], float]
) -> float:
    """Return the median of a value over the rounds that have it."""
    values = []
    for one in rounds:
        try:
            values.append(value(one))
        except KeyError:
            continue
    if not values:
        raise ValueError("no round has all that this figure needs")
    return statistics.median(values)
