"""Start the ranks of a test as processes that speak over loopback, with a time limit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 1200
"""After which a hang is an error; the ranks share the cores with other tests."""


def environment() -> dict[str, str]:
    """What the processes of a test are started with."""
    own = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return {name: value for name, value in os.environ.items() if name != "RANK"} | own


def run_ranks(module: str, ranks: int, folder: Path) -> list[tuple[int, str]]:
    """Run ``python -m module FOLDER STORE RANK RANKS`` on each rank.

    Returns:
        The exit status and the output of each rank.
    """
    command = [sys.executable, "-m", module, str(folder), str(folder / f"store{ranks}")]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(ranks)],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(process.returncode, out) for process, out in zip(processes, outputs, strict=True)]


def torchrun(module: str, ranks: int, folder: Path) -> tuple[int, str]:
    """Run ``torchrun -m module FOLDER`` with so many processes on this machine.

    Returns:
        Its exit status, and the output of all.
    """
    options = ["--standalone", "--nproc-per-node", str(ranks), "-m", module, str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output = process.communicate(timeout=SECONDS)[0]
    finally:
        process.terminate()  # which ends the ranks, too
        process.wait(timeout=SECONDS)
    return process.returncode, output
