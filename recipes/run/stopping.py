"""Stop a run after a complete step when a signal asks for it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_requests() -> Iterator[Callable[[], signal.Signals | None]]:
    """Handle SIGINT and SIGTERM while the body runs.

    The first signal is only recorded, for the body to act on after a complete step. The second
    ends the process at once, as that signal does by default (the shell sees 128 + its number).
    Afterwards the previous handlers are restored. A signal that is ignored (a job started with
    ``nohup``) stays ignored. Only the main thread can handle signals, so in other threads no
    handler is installed.

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
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handle)
    try:
        yield lambda: asked[0] if asked else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:  # the signal came after the last check of the body
        signal.raise_signal(asked[0])
