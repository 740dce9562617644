"""One try of a reader: it reads, or refuses as documented, within time and memory."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings

Result = TypeVar("Result")
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
"""Tries of every reader in `make fuzz`; 0 is the suite, with a few hundred, the same every time."""
SUITE = 150
_SECONDS = 20
_MEMORY = 4 * 2**30


@dataclass
class Tally:
    """What became of the tries of one reader."""

    records: int = 0
    parsed: int = 0
    refused: int = 0
    seconds: float = field(default=0.0)


TALLIES: dict[str, Tally] = {}


def fuzzed(examples: int = EXAMPLES // 20 or SUITE) -> settings:
    """Settings of a test: random tries (``bulk`` makes most of them), or the same every time."""
    return settings(
        max_examples=examples,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,  # ``attempt`` has one
        suppress_health_check=list(HealthCheck),
    )


class _Hang(BaseException):
    """Raised by the alarm; no reader catches it."""


def attempt(
    name: str, read: Callable[[], Result], refusals: tuple[type[Exception], ...]
) -> Result | Exception:
    """What ``read`` returns, or the documented error that it raises; any other error passes.

    Counted under ``name``.
    """
    tally = TALLIES.setdefault(name, Tally())
    started = time.perf_counter()
    tally.records += 1
    signal.signal(signal.SIGPROF, _alarm)
    signal.setitimer(signal.ITIMER_PROF, _SECONDS)  # of computing: the machine may be busy
    try:
        result: Result | Exception = read()
        tally.parsed += 1
    except refusals as error:
        tally.refused += 1
        result = error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        tally.seconds += time.perf_counter() - started
    if isinstance(result, refusals):
        assert 0 < len(str(result)) < 4_000, "a message that nobody reads"
    return result


def rows() -> list[dict[str, Any]]:
    """All tallies, as ``results/fuzz.json`` holds them."""
    return [
        {"format": name, **asdict(tally), "seconds": round(tally.seconds, 1)}
        for name, tally in sorted(TALLIES.items())
    ]


@contextmanager
def limited_memory() -> Iterator[None]:
    """Address space of this process may grow by 4 GiB: a reader that wants more fails."""
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + _MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _alarm(*_: object) -> None:
    raise _Hang(f"no answer within {_SECONDS} s")
