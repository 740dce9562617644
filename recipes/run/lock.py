"""One process per run directory: a file that says who is at work there.

``lock`` holds the process id, the host and when the process started. It is removed when the run
ends, however it ends, unless the process is killed: then the next run finds that no such process is
there any more (the same id with another start counts as another process) and takes the lock over.
Across hosts nobody can look; a lock of another host is respected until somebody removes it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from recipes.options.values import OptionError
from recipes.run.directory import LOCK
from recipes.run.files import write_text


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a run directory, which must exist, while the body runs.

    Raises:
        OptionError: another process holds it.
        OSError: the lock cannot be written.
    """
    path = directory / LOCK
    _acquire(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()


def at_work(directory: Path) -> bool:
    """Whether a process holds the lock of a run directory; one on another host counts as there."""
    try:
        holder = _read(directory / LOCK)
    except FileNotFoundError:
        return False
    return _holds(holder)


def _acquire(path: Path) -> None:
    """Write the lock, unless somebody has it; looking and writing are one to other processes."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without such locks: two starts at once may both win
            fcntl.flock(folder, fcntl.LOCK_EX)
        # Read, not looked for first: its owner removes it whenever its run ends.
        with suppress(FileNotFoundError):
            holder = _read(path)
            if _holds(holder):
                raise OptionError(
                    f"{path.parent}: another process works in this run directory "
                    f"({_spelled(holder)}). Wait for it or stop it; if it is gone, remove {path}"
                )
            print(f"{path.parent}: took over the lock of a killed run ({_spelled(holder)})")
        write_text(path, json.dumps(_myself()) + "\n")
    finally:
        os.close(folder)


def _holds(holder: dict[str, Any] | None) -> bool:
    """Whether what a lock says keeps others out: its process lives, or nobody here can tell."""
    return holder is None or holder.get("host") != socket.gethostname() or _lives(holder)


def _read(path: Path) -> dict[str, Any] | None:
    """What a lock says; None: it cannot be understood.

    Raises:
        FileNotFoundError: there is no lock.
    """
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return holder if isinstance(holder, dict) and isinstance(holder.get("pid"), int) else None


def _spelled(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "its lock cannot be read"
    return f"process {holder['pid']} on {holder.get('host')}, since {holder.get('since')}"


def _myself() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "started": _started(os.getpid()),
    }


def _lives(holder: dict[str, Any]) -> bool:
    """Whether the process is there, and is the one that wrote the lock."""
    pid = holder["pid"]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's, so it is there
    started = _started(pid)
    return started != "ended" and started == holder.get("started", started)


def _started(pid: int) -> str | None:
    """Clock ticks from boot to the start of a process; "ended": only waited for; None: unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    after_name = stat.rpartition(")")[2].split()
    return "ended" if after_name[0] in "ZX" else after_name[19]
