"""Start the ranks of a test as processes that speak over loopback, with a time limit.

``python -m tests.rank_processes MODULE FOLDER RANKS ...`` imports a module once, and forks ranks.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from types import ModuleType

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


def fork_ranks(module: str, folder: Path, *numbers: int) -> None:
    """Call ``main(FOLDER, STORE, RANK, RANKS)`` of a module on each rank, for each number in turn.

    The ranks are forked from one process, which has imported the module: what they import is a
    second of work for each. They have one seed for the hashes of texts; those of ``run_ranks`` and
    ``torchrun`` have their own.

    Raises:
        AssertionError: A rank ended with an error; the message is what it printed.
    """
    command = [sys.executable, "-m", "tests.rank_processes", module, str(folder)]
    process = subprocess.Popen(
        [*command, *map(str, numbers)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that the ranks are killed with it
    )
    try:
        output = process.communicate(timeout=SECONDS)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, output


def printed(folder: Path, rank: int, ranks: int) -> str:
    """What a forked rank printed."""
    return _output_of(folder, rank, ranks).read_text(encoding="utf-8")


def torchrun(module: str, ranks: int, *words: str, **variables: str) -> tuple[int, str]:
    """Run ``torchrun -m module WORDS`` with so many processes on this machine.

    Args:
        module: Its name.
        ranks: The number of processes.
        words: The arguments of the module.
        variables: Further variables of the environment, such as those of ``accelerate launch``.

    Returns:
        Its exit status, and the output of all.
    """
    options = ["--standalone", "--nproc-per-node", str(ranks), "-m", module, *words]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options],
        cwd=ROOT,
        env=environment() | variables,
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


def _output_of(folder: Path, rank: int, ranks: int) -> Path:
    return folder / f"output-{rank}-of-{ranks}.txt"


def _forked(module: ModuleType, folder: Path, rank: int, ranks: int) -> int:
    """Start a rank, and return the number of its process."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with _output_of(folder, rank, ranks).open("w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        module.main(folder, str(folder / f"store{ranks}"), rank, ranks)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main(name: str, folder: Path, *numbers: int) -> int:
    """Run the ranks, and print what those that failed have printed."""
    module = importlib.import_module(name)
    failed = 0
    for ranks in numbers:
        children = [_forked(module, folder, rank, ranks) for rank in range(ranks)]
        for rank, child in enumerate(children):
            if os.waitpid(child, 0)[1]:
                print(f"rank {rank} of {ranks}:\n{printed(folder, rank, ranks)}", flush=True)
                failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])))
