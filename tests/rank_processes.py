"""Start the ranks of a test as processes that speak over loopback, with a time limit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 300
"""After which a hang is an error; the ranks share the cores with other tests."""


def run_ranks(module: str, ranks: int, folder: Path, *arguments: str) -> list[tuple[int, str]]:
    """Run ``python -m module STORE RANK RANKS FOLDER ARGUMENTS`` on each rank.

    Returns:
        The exit status and the output of each rank.
    """
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, str(folder / f"store{ranks}")]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(folder), *arguments],
            cwd=ROOT,
            env=environment,
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
