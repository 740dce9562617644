"""Commands over shards, in float64: ranks that are forked from one process, which imports once.

``python -m tests.recipes.shard_commands FOLDER`` runs the commands of ``FOLDER/commands.json`` one
after the other, each on its number of ranks. Exit statuses and what was printed are left there.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint, fsdp  # noqa: F401  (before the ranks are forked)
from transformers.models.internvl import modeling_internvl  # noqa: F401
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

import prm.placement
from bilevel.shards import checkpoint as shards_checkpoint
from prm.models.model import load_prm
from prm.placement import Placement
from recipes.__main__ import main as run_command
from recipes.run.errors import StepError
from recipes.train import training


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

    weights = training.final_weights

    def final_weights(options: Any, objective: Any, state: Any, *others: Any) -> Any:
        upper = {name: value.float() for name, value in state.upper_params.items()}
        return weights(options, objective, state._replace(upper_params=upper), *others)

    training.final_weights = final_weights  # scores of a file are float32
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


def held_at(step: int, rank: int) -> None:
    """Let one rank never write its part of the checkpoint of a step."""
    write = shards_checkpoint._write

    def held(path: Path, *others: Any) -> None:
        if path.parent.name == f"step-{step}" and int(os.environ["RANK"]) == rank:
            threading.Event().wait()
        write(path, *others)

    shards_checkpoint._write = held


def run(rank: int, command: dict[str, Any], folder: Path) -> None:
    """Run a command as one of its ranks."""
    with (folder / f"output-{rank}.txt").open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(command["ranks"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(command["port"])}
    fault_at(*command.get("fault", (-1, -1, signal.SIGTERM)))
    held_at(*command.get("held", (-1, -1)))
    print(f"## {' '.join(command['arguments'])}", flush=True)
    status = run_command(command["arguments"])
    with (folder / f"statuses-{rank}.txt").open("a") as file:
        file.write(f"{command['name']} {status}\n")


def forked(rank: int, command: dict[str, Any], folder: Path) -> int:
    """Start a rank, and return the number of its process."""
    child = os.fork()
    if not child:
        try:
            run(rank, command, folder)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(0)
    return child


def main(folder: Path) -> None:
    """Run all commands."""
    in_float64()
    for command in json.loads((folder / "commands.json").read_text()):
        for child in [forked(rank, command, folder) for rank in range(command["ranks"])]:
            os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
