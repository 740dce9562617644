"""The process that measures, and what its parent knows of it.

``python -m recipes.evidence.gpu.worker SIZE DEVICE ROUNDS SAMPLES`` reads a case per line of its
standard input, and answers each by a line of its standard output, after a first line on the machine
once the model stands. Nothing in a process can end a kernel that hangs; its parent can end it.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Self

from recipes.evidence.gpu.case import Case


class Ended(RuntimeError):
    """The process ended without an answer; the message has the last line of its errors."""


class Worker:
    """A measuring process, ended with the context.

    Args:
        command: Its command line.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue  # A case that it no longer read.

    def ask(self, one: Case) -> None:
        """Give it a case; see ``answer``."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asdict(one)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return  # ``answer`` says that it ended.

    def answer(self, limit: float) -> dict[str, Any] | None:
        """Return its next line, None if none comes within so many seconds.

        Raises:
            Ended: The process ended.
        """
        try:
            line = self._answers.get(timeout=limit)
        except queue.Empty:
            return None
        if line is None:
            self._process.wait()
            self._errors.seek(0)
            last = self._errors.read().strip().splitlines()[-1:]
            raise Ended(f"status {self._process.returncode}: {' '.join(last)}")
        found: dict[str, Any] = json.loads(line)
        return found

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)


def command(size: str, device: str, rounds: int, samples: int) -> list[str]:
    """Return the command line of a measuring process."""
    module = "recipes.evidence.gpu.worker"
    return [sys.executable, "-m", module, size, device, str(rounds), str(samples)]


def main(arguments: Sequence[str]) -> None:
    """Answer cases until there are no more."""
    answers, sys.stdout = sys.stdout, sys.stderr  # What others print is no answer.
    import torch

    from recipes.evidence.bench.race.model import SHAPES
    from recipes.evidence.gpu.answer import answer
    from recipes.evidence.gpu.meter import meter
    from recipes.evidence.gpu.subject import start
    from recipes.run.provenance import environment, machine

    size, device, rounds, samples = arguments
    where = torch.device(device)
    torch.backends.cudnn.allow_tf32 = False  # float32 is the reference of the other precisions.
    begun = start(SHAPES[size], where)
    about: dict[str, Any] = {
        "card": None,
        "card_bytes": None,
        "machine": machine(),
        "environment": environment(),
        "parameters": sum(value.numel() for value in begun.values.values()),
    }
    if where.type == "cuda":
        card = torch.cuda.get_device_properties(where)
        about |= {"card": card.name, "card_bytes": card.total_memory}
    measuring = meter(where)
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        found = answer(begun, Case(**json.loads(line)), measuring, int(rounds), int(samples))
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
