"""A profile of some steps of training: seconds and bytes of each part, and a trace for Chrome."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from bilevel.profiling import PARTS

STEP_PARTS = ("data", *PARTS, "judge")
"""The parts of a step in the order of the table; parts of ``recipes.train.loop`` are outermost."""


@contextmanager
def profiled(steps: int, directory: Path) -> Iterator[Callable[[], None]]:
    """Profile the steps behind the first one that the body takes.

    Writes ``parts.json`` and ``trace.json`` into the directory, and prints the parts, when the
    steps are over, or fewer of them with the body. The steps themselves take longer than without a
    profile, those of many small operations most.

    Args:
        steps: The number of steps to profile. With 0, nothing happens.
        directory: The directory to write, which is created.

    Yields:
        A function that the body calls after each step.
    """
    if not steps:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(
        activities=activities,
        schedule=schedule(wait=0, warmup=1, active=steps, repeat=1),
        on_trace_ready=lambda found: _write(found, directory),
        profile_memory=True,
    ) as profiler:
        yield profiler.step


def _write(found: Any, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(directory / "trace.json"))
    parts = parts_of(found)
    (directory / "parts.json").write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")
    print(table_of(parts))


def parts_of(found: Any) -> dict[str, dict[str, float]]:
    """Return what a profile of torch has on the parts of a step, those that ran, by name.

    ``calls``; ``host_seconds`` and ``device_seconds``, of all calls together, what they call
    included; ``host_bytes`` and ``device_bytes``, allocated less freed.
    """
    averages = {entry.key: entry for entry in found.key_averages()}
    return {
        name: {
            "calls": averages[name].count,
            "host_seconds": averages[name].cpu_time_total / 1e6,
            "device_seconds": averages[name].device_time_total / 1e6,
            "host_bytes": averages[name].cpu_memory_usage,
            "device_bytes": averages[name].device_memory_usage,
        }
        for name in STEP_PARTS
        if name in averages
    }


def table_of(parts: dict[str, dict[str, float]]) -> str:
    """Return the parts as a table, one line each."""
    head = (
        f"{'profile':<16}{'calls':>7}{'host s':>10}{'device s':>10}{'host MB':>10}{'device MB':>11}"
    )
    lines = [
        f"{name:<16}{entry['calls']:>7.0f}{entry['host_seconds']:>11.3f}"
        f"{entry['device_seconds']:>11.3f}{entry['host_bytes'] / 1e6:>11.1f}"
        f"{entry['device_bytes'] / 1e6:>11.1f}"
        for name, entry in parts.items()
    ]
    return "\n".join([head, *lines])
