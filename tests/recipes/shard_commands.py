"""Commands over shards, in float64: ranks that are forked from one process, which imports once.

``python -m tests.recipes.shard_commands FOLDER`` reads ``FOLDER/phases.json``: for each phase a
list of commands, with the number of their ranks. Exit statuses and what was printed are left in
``FOLDER``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint, fsdp  # noqa: F401  (before the ranks are forked)
from transformers.models.internvl import modeling_internvl  # noqa: F401
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

import prm.placement
from prm.models.model import load_prm
from prm.placement import Placement
from recipes.__main__ import main as run_command
from recipes.run.errors import StepError
from recipes.train import training

MOST = 3
"""Ranks of a phase, of which a command may take fewer."""


def in_float64() -> None:
    """Let the commands of this process compute in float64 throughout.

    A model that computes its norms in float32 rounds what differs in the sixteenth digit to numbers
    that differ in the seventh.
    """

    def load(path: Any, *, dtype: torch.dtype, **others: Any) -> Any:
        return load_prm(path, dtype=torch.float64, **others)

    def params(self: Placement, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.double() for name, value in values.items()}

    def norm(self: Any, hidden: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)
        found: Tensor = self.weight * (hidden * scale)
        return found

    prm.placement.load_prm = load
    Placement.params = params
    Qwen2RMSNorm.forward = norm


_RUN = training.run_training


def fault_at(step: int, rank: int, number: int) -> None:
    """Let a signal, or with number 0 an error, befall one rank once a step is logged."""

    def logged(taken: int) -> None:
        if taken == step and int(os.environ["RANK"]) == rank:
            if number == 0:
                raise StepError("a picture is gone")
            os.kill(os.getpid(), number)

    training.run_training = partial(_RUN, logged=logged)


def rank_of(rank: int, commands: list[dict[str, Any]], folder: Path) -> None:
    """Run the commands of a phase as one of its ranks."""
    with (folder / f"output-{rank}.txt").open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for command in commands:
        ranks = command["ranks"]
        if rank >= ranks:
            continue
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(command["port"])
        fault_at(*command.get("fault", (-1, -1, signal.SIGTERM)))
        print(f"## {' '.join(command['arguments'])}", flush=True)
        status = run_command(command["arguments"])
        with (folder / f"statuses-{rank}.txt").open("a") as file:
            file.write(f"{command['name']} {status}\n")


def main(folder: Path) -> int:
    """Run the phases one after the other."""
    in_float64()
    for commands in json.loads((folder / "phases.json").read_text()):
        children = []
        for rank in range(MOST):
            child = os.fork()
            if not child:
                try:
                    rank_of(rank, commands, folder)
                finally:
                    sys.stdout.flush()
                    os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
