"""What SIGINT, SIGTERM and SIGHUP do: end the process, interrupt its work, or stop a run.

While a module is imported, an exception may end in a traceback or in an abort of C++ code: the
process ends at once. Work is interrupted by an exception, so that locks
and unfinished files are removed. Training completes its step and saves its state.

A signal that is ignored (SIGHUP in a job started with ``nohup``) stays ignored. Only the main
thread can handle signals, so in other threads nothing here has an effect.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """A signal asked to end the work.

    Attributes:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Let signals end the process while the body runs, with status 128 + number and no output."""
    with _handled(_end):
        yield


@contextmanager
def interrupting() -> Iterator[None]:
    """Let the first signal raise ``Interrupted`` in the body, and the second end the process.

    While the body imports a module, or in a process that it forked, already the first ends it.
    """
    process = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process or _imports(frame):
            _end(number, frame)
        for each in _SIGNALS:
            if signal.getsignal(each) is handle:
                signal.signal(each, _end)
        raise Interrupted(number)

    with _handled(handle):
        yield


@contextmanager
def stop_requests() -> Iterator[Callable[[], signal.Signals | None]]:
    """Record signals while the body runs.

    The first signal is only recorded, for the body to act on after a complete step. The second
    ends the process at once, as that signal does by default (the shell sees 128 + its number).
    Afterwards the previous handlers are restored.

    Yields:
        A function that returns the signal that arrived, or None.
    """
    asked: list[signal.Signals] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)  # in this thread: delivered before this returns
            return
        asked.append(signal.Signals(number))
        # print is not safe here: the signal may have arrived while print held the stream.
        text = f"\n{asked[0].name}: stopping after this step, with a checkpoint; again: at once\n"
        with suppress(OSError):  # the terminal is gone
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())

    with _handled(handle):
        yield lambda: asked[0] if asked else None
    if asked:  # the signal came after the last check of the body
        signal.raise_signal(asked[0])


def _imports(frame: FrameType | None) -> bool:
    """Return whether a module is being imported in a frame or in those that called it."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Install a handler for the signals that are not ignored, and restore the previous ones."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
