"""Peak memory, arithmetic and time of a call.

Memory is what torch's CPU allocator reports to its profiler, byte for byte: every tensor, saved for
backward or not, temporaries of kernels included, and the same number at every call. Resident
memory would add what the C library keeps of freed blocks. Scratch space of the matrix kernels is
not torch's and not counted.
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
from typing import Any, TypeVar

from torch._C._autograd import _enable_record_function
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def with_peak(run: Callable[[], T]) -> tuple[T, int]:
    """Return what `run` returns, and by how many bytes tensors grew at most while it ran."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler reports to stderr
    gc.collect()  # garbage of before, freed while recording, would be subtracted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        # Without the record of every operation: for 64 steps it takes 7 GB.
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


def with_flops(run: Callable[[], T]) -> tuple[T, int]:
    """Return what `run` returns, and the floating-point operations of its matrix products."""
    with FlopCounterMode(display=False) as counter:
        result = run()
    return result, int(counter.get_total_flops())


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed, for the rest of the process; whether it can (glibc).

    By default it returns freed memory at the end of its heap to the system, and whoever asks next
    pays for 4 kB pages one by one: 20,000 of them, a third of a forward pass of `core`'s model, for
    an iteration whose results happen to be freed last. What is timed here begins every time from
    the same state and drops its results, which a training loop does not.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(name, 1 << 30) for name in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD))


@dataclass(frozen=True)
class Timed:
    """Something to time: in every `every`-th round."""

    run: Callable[[], object]
    every: int = 1


def in_rounds(
    timed: Mapping[str, Timed], rounds: int, report: Callable[[str], None] = lambda _: None
) -> list[dict[str, float]]:
    """Return, per round, the seconds of everything that was due in it.

    One call of each per round, so that a slow moment of the machine meets all alike, in an order
    drawn for the round, so that none is always helped or hindered by what ran before it. Everything
    is due in round 0; a call before it, not counted, warms what is due in every round. What earlier
    rounds left behind in cycles is freed before each.
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
                started = time.perf_counter()
                one.run()
                seconds[-1][name] = time.perf_counter() - started
        report(f"round {index + 1} of {rounds}: {sum(seconds[-1].values()):.1f} s")
    return seconds


def median_of(
    rounds: Sequence[Mapping[str, float]], value: Callable[[Mapping[str, float]], float]
) -> float:
    """Median of a figure over the rounds that have it."""
    values = []
    for one in rounds:
        try:
            values.append(value(one))
        except KeyError:
            continue
    if not values:
        raise ValueError("no round has all that this figure needs")
    return statistics.median(values)
