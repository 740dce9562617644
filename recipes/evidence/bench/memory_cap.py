"""TorchOpt's unroll in a process of its own, which is ended when it exceeds a memory limit.

``python -m recipes.evidence.bench.memory_cap SIZES WINDOW STEPS THREADS`` is that process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from recipes.evidence.bench.case import make_case
from recipes.evidence.bench.decoder import Sizes
from recipes.evidence.bench.measure import with_flops, with_peak
from recipes.evidence.bench.peers import torchopt_unroll


def capped(command: Sequence[str], cap: int) -> str | None:
    """Return a command's standard output, or None if its resident memory exceeded ``cap`` bytes.

    Its memory is polled, so that the command is ended before the machine runs out of memory. The
    memory between the last poll and its end is known to the command alone.

    Raises:
        RuntimeError: The command failed (the message has the end of its output), or the system has
            no /proc to read its memory from (systems other than Linux).
    """
    if not Path("/proc/self/status").is_file():
        raise RuntimeError("resident memory is read from /proc, which this system does not have")
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, text=True)
        try:
            while process.poll() is None:
                if _peak_resident(process.pid) > cap:
                    return None
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()
        out.seek(0)
        errors.seek(0)
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {errors.read()[-2000:]}")
        return out.read()


def _peak_resident(pid: int | Literal["self"]) -> int:
    """Return the peak resident memory of a process in bytes, or 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # It has just ended.
        return 0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(lines[0].split()[1]) if lines else 0


def measure_torchopt(sizes: Sizes, window: int, steps: int, cap: int) -> dict[str, Any] | None:
    """Return hypergradient, peak and flops of ``torchopt_unroll``; None if it exceeded ``cap``."""
    arguments = [json.dumps(asdict(sizes)), str(window), str(steps), str(torch.get_num_threads())]
    output = capped([sys.executable, "-m", "recipes.evidence.bench.memory_cap", *arguments], cap)
    if output is None:
        return None
    figures = json.loads(output.splitlines()[-1])
    return None if figures.pop("resident") > cap else figures


def main(arguments: Sequence[str]) -> None:
    """Evaluate ``torchopt_unroll``; print ``measure_torchopt``'s result and the resident peak."""
    sizes, window, steps, threads = json.loads(arguments[0]), *map(int, arguments[1:])
    torch.set_num_threads(threads)
    case = make_case(Sizes(**sizes), window)
    (hypergradient, flops), peak = with_peak(
        lambda: with_flops(lambda: torchopt_unroll(case, steps))
    )
    measured = {"hypergradient": hypergradient.tolist(), "flops": flops, "peak": peak}
    print(json.dumps(measured | {"resident": _peak_resident("self")}))


if __name__ == "__main__":
    main(sys.argv[1:])
