"""Time, memory and launches of a call, on a CUDA device or on a CPU.

On a CPU, where the tool is tried, memory is the record of torch's allocator, a launch is a
dispatched operation that computes, and a wait for the device is a value read by Python.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from recipes.evidence.bench.measure import with_peak

GB = 10**9


class Counts(NamedTuple):
    """What a call asked of the device.

    Attributes:
        launches: Kernels that were started.
        copies: Copies and fills of memory that were started.
        reads: Copies from the device to the host.
        waits: Times that the host waited for the device.
    """

    launches: int
    copies: int
    reads: int
    waits: int


class Meter(Protocol):
    """Measurements of calls on one device."""

    def seconds(self, run: Callable[[], object], rounds: int) -> tuple[float, float | None]:
        """Return the median seconds by the clock, and by the events of the device if it has any.

        The device is idle before and after each of the ``rounds`` calls.
        """

    def peak(self, run: Callable[[], object], held: int) -> tuple[int, int | None]:
        """Return the most bytes allocated, and reserved by the allocator, during a call.

        Args:
            run: The call.
            held: The bytes that are allocated before it, for a device that does not know them.
        """

    def counted(self, run: Callable[[], object]) -> Counts:
        """Return what a call asked of the device."""

    def fits(self, run: Callable[[], object], held: int, cap: float) -> bool:
        """Return whether a call needs at most ``cap`` GB; it may also end in OutOfMemoryError.

        Raises:
            ValueError: The device has less memory than that.
        """


def meter(device: torch.device) -> Meter:
    """Return the meter of a device."""
    return CudaMeter(device) if device.type == "cuda" else CpuMeter()


class CpuMeter:
    """Measurements on a CPU; see ``Meter``."""

    def seconds(self, run: Callable[[], object], rounds: int) -> tuple[float, float | None]:
        """Return the median by the clock."""
        found = []
        for _ in range(rounds):
            started = time.perf_counter()
            run()
            found.append(time.perf_counter() - started)
        return statistics.median(found), None

    def peak(self, run: Callable[[], object], held: int) -> tuple[int, int | None]:
        """Return what is held and the growth during the call."""
        return held + with_peak(run)[1], None

    def counted(self, run: Callable[[], object]) -> Counts:
        """Return the dispatched operations that compute, and the values that Python read."""
        with _Dispatched() as seen:
            run()
        reads = sum(seen.counts[name] for name in _READ)
        copies = sum(seen.counts[name] for name in _COPIED)
        rest = sum(seen.counts.values()) - reads - copies
        return Counts(rest, copies, reads, reads)

    def fits(self, run: Callable[[], object], held: int, cap: float) -> bool:
        """Return whether the peak is at most the cap."""
        return self.peak(run, held)[0] <= cap * GB


class CudaMeter:
    """Measurements on a CUDA device; see ``Meter``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def seconds(self, run: Callable[[], object], rounds: int) -> tuple[float, float | None]:
        """Return both medians."""
        clock, device = [], []
        for _ in range(rounds):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(self._device)
            started = time.perf_counter()
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize(self._device)
            clock.append(time.perf_counter() - started)
            device.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(clock), statistics.median(device)

    def peak(self, run: Callable[[], object], held: int) -> tuple[int, int | None]:
        """Return the allocator's records."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        run()
        torch.cuda.synchronize(self._device)
        return (
            torch.cuda.max_memory_allocated(self._device),
            torch.cuda.max_memory_reserved(self._device),
        )

    def counted(self, run: Callable[[], object]) -> Counts:
        """Return the calls of the CUDA runtime; those of the profiler itself are taken off."""
        own = count_events(self._events(lambda: None))
        return Counts(*(a - b for a, b in zip(count_events(self._events(run)), own, strict=True)))

    def fits(self, run: Callable[[], object], held: int, cap: float) -> bool:
        """Run it with the allocator held to the cap."""
        with self._capped(cap):
            run()
            torch.cuda.synchronize(self._device)
        return True

    @contextmanager
    def _capped(self, cap: float) -> Iterator[None]:
        total = torch.cuda.get_device_properties(self._device).total_memory
        if cap * GB > total:
            raise ValueError(f"the card has {total / GB:.1f} GB")
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(cap * GB / total, self._device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self._device)

    def _events(self, run: Callable[[], object]) -> Iterator[str]:
        torch.cuda.synchronize(self._device)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            run()
        profiler: Any = recorded.profiler
        return (event.name() for event in profiler.kineto_results.events())


_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchCooperativeKernel")
_COPIES = ("cudaMemcpy", "cudaMemset")
_WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"}


def count_events(names: Iterable[str]) -> Counts:
    """Return the counts of a profile, by the names of its events.

    Calls of the runtime are counted, not the kernels that they start, which are events, too; a copy
    to the host is known by the copy itself ("Memcpy DtoH (Device -> Pageable)").
    """
    seen: Mapping[str, int] = Counter(names)

    def total(wanted: Callable[[str], bool]) -> int:
        return sum(count for name, count in seen.items() if wanted(name))

    return Counts(
        launches=total(lambda name: name.startswith(_LAUNCHES)),
        copies=total(lambda name: name.startswith(_COPIES)),
        reads=total(lambda name: name.startswith("Memcpy DtoH")),
        waits=total(lambda name: name in _WAITS),
    )


_READ = ("_local_scalar_dense",)
_COPIED = ("copy_", "_to_copy", "clone", "fill_", "zero_", "zeros_like", "ones_like", "full")
_FREE = ("empty", "new_empty", "detach", "lift_fresh", "_unsafe_view", "set_")


class _Dispatched(TorchDispatchMode):
    """Counts operations by name, views and empty tensors left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(_FREE):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))
