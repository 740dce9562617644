"""The lock of a run directory or of an output: a file that names the process at work there.

The file ``lock`` (of an output, ``<name>.lock``) is a ``filelock.SoftFileLock``: it holds the
process id, the host and, where the system provides it, the start time of the process. It is removed
when the run ends, unless the process is killed. In that case the next run finds that the process is
gone (the same id with another start time is another process) and takes the lock over. The processes
of another host cannot be seen, so its lock is respected until somebody removes the file.

This module adds three things to ``SoftFileLock`` (4.2.11):

* It reads a lock without acquiring it: ``runs show`` must not write into a run directory.
* It detects processes that have ended and that their parent has not waited for yet. They still have
  their id, and keep it for ever in a container whose first process waits for no child.
* It takes a lock over where the file system cannot exchange two names (NFS, SMB).
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import SoftFileLock, Timeout

from recipes.options.values import OptionError
from recipes.run.directory import LOCK
from recipes.terminal import say

_NO_PROCESS = 2**31 - 1
"""A process id that no system assigns."""


@dataclass(frozen=True)
class _Record:
    """The content of a lock file.

    Attributes:
        text: The process id, the host and the start of the process, one on each line.
        since: The time at which it was written, in seconds since the epoch.
    """

    text: str
    since: float

    def __str__(self) -> str:
        lines = self.text.splitlines()
        if len(lines) < 2 or not lines[0].isdecimal():
            return "its lock cannot be read"
        host = lines[1].partition("?pidns-")[0]  # filelock adds the namespace of process ids
        since = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(self.since))
        return f"process {lines[0]} on {host}, since {since}"


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """Hold the lock of a run directory, or of a file that is written, while the body runs.

    Args:
        place: A directory, whose lock is the file ``lock`` in it, or a file, whose lock has its
            name and ``.lock``. A symbolic link is followed, so that two names of a file share one.

    Raises:
        OptionError: Another process holds the lock.
        OSError: The lock cannot be written.
    """
    path = _lock_of(Path(os.path.realpath(place)))
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = SoftFileLock(path, timeout=0)
    with _one_starts(path.parent):
        record = _read(path)
        if record is not None:
            if _is_held(record):
                raise _refused(place, path, record)
            lock.break_lock()
            say(f"{place}: took over the lock of a killed run ({record})")
        try:
            lock.acquire()
        except Timeout:
            raise _refused(place, path, _read(path)) from None
    try:
        yield
    finally:
        with suppress(OSError):
            lock.release()


def _lock_of(place: Path) -> Path:
    return place / LOCK if place.is_dir() else place.with_name(f"{place.name}.{LOCK}")


def at_work(directory: Path) -> bool:
    """Return whether a process holds the lock; one on another host is assumed to be alive."""
    record = _read(directory / LOCK)
    return record is not None and _is_held(record)


@contextmanager
def _one_starts(directory: Path) -> Iterator[None]:
    """Let one process at a time read the lock of a directory and write its own."""
    folder = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # without flock, two runs that start at once may both get it
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _read(path: Path) -> _Record | None:
    """Return the content of a lock file, or None if there is no lock."""
    # Whether it exists is not tested first: its owner may remove it at any time.
    try:
        with path.open("rb") as file:
            text, since = file.read(2**10), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    return _Record(_in_lines(text.decode("utf-8", "replace")), since)


def _in_lines(text: str) -> str:
    """Return the content of a lock in lines, also if it is the JSON object of version 0.1.0."""
    try:
        holder = json.loads(text)
        return f"{holder['pid']:d}\n{holder['host']}\n"
    except (ValueError, TypeError, KeyError, RecursionError):
        return text


def _is_held(record: _Record) -> bool:
    """Return whether a lock is held: its process is alive, or that cannot be determined here.

    ``SoftFileLock`` decides whether the process is alive, but only when it acquires a lock. So it
    tries to acquire a copy of the lock in another directory.
    """
    text, (pid, _, rest) = record.text, record.text.partition("\n")
    if _has_ended(pid):
        text = f"{_NO_PROCESS}\n{rest}"
    try:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / LOCK
            copy.write_bytes(text.encode())
            with SoftFileLock(copy, timeout=0):
                return False
    except OSError:  # a Timeout, or a temporary directory that cannot be written
        return True


def _has_ended(pid: str) -> bool:
    """Return whether a process of this host has ended and its parent has not waited for it."""
    try:
        stat = Path(f"/proc/{int(pid)}/stat").read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return False
    return stat.rpartition(")")[2].split()[0] in "ZX"


def _refused(place: Path, lock: Path, record: _Record | None) -> OptionError:
    holder = "it has just started" if record is None else record
    what = "works in this run directory" if place.is_dir() else "writes this file"
    path = place / LOCK if place.is_dir() else lock
    return OptionError(
        f"{place}: another process {what} ({holder}). Wait for it or stop it; if it is gone, "
        f"remove {path}"
    )
