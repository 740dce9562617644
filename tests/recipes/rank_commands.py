"""Commands that the ranks of a test run, one after the other, and faults that befall a rank.

``python -m tests.recipes.rank_commands FOLDER STORE RANK RANKS`` reads ``FOLDER/commands.json``;
without STORE, RANK and RANKS it is started by torchrun. Exit statuses are left in ``FOLDER``.
``tests.rank_processes.fork_ranks`` calls ``main``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from recipes.__main__ import main as run_command
from recipes.train import training  # also before ranks are forked


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fault_at(folder: Path, step: int, rank: int, number: int) -> None:
    """Send a signal to one rank once a step of a training run is logged, and note the time."""

    def logged(taken: int) -> None:
        if taken == step and int(os.environ["RANK"]) == rank:
            (folder / "fault").write_text(str(time.time()))
            os.kill(os.getpid(), number)

    run = training.run_training
    training.run_training = partial(getattr(run, "func", run), logged=logged)


def main(folder: Path, store: str, rank: int, ranks: int) -> None:
    """Run the commands as one of the ranks; these meet at a port, not in the store."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    statuses: list[int] = []
    commands: list[dict[str, Any]] = json.loads((folder / "commands.json").read_text())
    for command in commands:
        if command["port"] is not None:
            os.environ["MASTER_PORT"] = str(command["port"])
        fault_at(folder, *command.get("fault", (-1, -1, signal.SIGTERM)))
        print(f"## {rank} {' '.join(command['arguments'])}", flush=True)
        statuses.append(run_command(command["arguments"]))
        (folder / f"statuses-{rank}.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    words = sys.argv[2:] or ["", os.environ["RANK"], os.environ["WORLD_SIZE"]]
    main(Path(sys.argv[1]), words[0], int(words[1]), int(words[2]))
