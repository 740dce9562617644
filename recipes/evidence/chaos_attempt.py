"""One attempt of ``recipes.evidence.chaos``: a command in a process that may kill itself.

This module imports everything that a run imports, so that the server from which the processes are
forked does so only once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import (  # noqa: F401 - transformers imports them when they are first named
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    InternVLForConditionalGeneration,
)

import recipes.train.training  # noqa: F401
from recipes import command_line

_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link"}
_WRITES = os.O_WRONLY | os.O_RDWR


def attempt(words: list[str], run: str, event: int | None, output: str) -> None:
    """Run a command with its output in a file, and end the process with its exit status.

    Args:
        words: The command line.
        run: The directory whose changes are counted.
        event: The number of the change, from 1, before which the process kills itself with SIGKILL.
            None means never.
        output: The file for the output, which ends with ``processor seconds: <number>`` and
            ``changes: <number>`` if the command ends by itself.
    """
    with open(output, "wb", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    tqdm.set_lock(threading.RLock())  # The default is a semaphore, which outlives a killed process.
    changes = 0

    def count(name: str, details: tuple[Any, ...]) -> None:
        nonlocal changes
        if _is_change(name, details, run):
            changes += 1
            if changes == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.addaudithook(count)
    status = command_line.run(words)
    print(f"processor seconds: {time.process_time()}")
    print(f"changes: {changes}")
    sys.exit(status)


def _is_change(name: str, details: tuple[Any, ...], run: str) -> bool:
    """Return whether an audit event announces a change of a file below ``run``."""
    if name == "open":
        path, mode, flags = details
        if not (flags & _WRITES if mode is None else set(mode) & set("wax+")):
            return False
    elif name in _CHANGES:
        path = details[0]
    else:
        return False
    return isinstance(path, str | Path) and os.fspath(path).startswith(run)
