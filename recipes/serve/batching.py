"""One thread that scores: requests that wait at the same time are scored together.

The event loop never waits for the model, and the model never for the event loop: a request is put
into the queue and gets a future. A request whose future is cancelled while it waits (its time is
over, its client is gone) is dropped without being scored.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Protocol

from prm.rewards.scorer import Judgement, Pictures, Solution
from prm.schema import DataError
from recipes.serve.requests import Asked

Judged = list[Judgement | DataError]
"""What the model says of every solution of a request, or why it cannot be judged."""


class Judge(Protocol):
    """What scores: a ``prm.Scorer``."""

    def judge(
        self,
        questions: Sequence[str],
        solutions: Sequence[Solution],
        images: Sequence[Pictures] | None = None,
    ) -> Judged:
        """Return what the model says of every solution, or why it cannot be judged."""
        ...


@dataclass(frozen=True, eq=False)
class _Waiting:
    asked: Asked
    future: Future[Judged] = field(default_factory=Future)


class Batcher:
    """Scores what waits in a thread of its own; requests are never split.

    Args:
        scorer: What scores.
        at_once: The largest number of solutions that are scored together. A request that has more
            is scored alone.

    Attributes:
        batches: How often the scorer was called.
        solutions: How many solutions were scored.
        seconds: How long that took.
    """

    def __init__(self, scorer: Judge, at_once: int) -> None:
        self.batches = 0
        self.solutions = 0
        self.seconds = 0.0
        self._scorer = scorer
        self._at_once = at_once
        self._queue: SimpleQueue[_Waiting | None] = SimpleQueue()
        # A daemon: a pass that takes minutes must not keep a process that was told to end.
        self._thread = Thread(target=self._work, name="scoring", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, asked: Asked) -> Future[Judged]:
        """Put a request into the queue, and return the future of what the model says of it."""
        waiting = _Waiting(asked)
        self._queue.put(waiting)
        return waiting.future

    def stop(self, seconds: float) -> bool:
        """Have the thread end when the queue is empty, and return whether it did so in time."""
        self._queue.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """About how many requests are in the queue."""
        return self._queue.qsize()

    @property
    def is_alive(self) -> bool:
        """Whether the thread scores what waits."""
        return self._thread.is_alive()

    def _work(self) -> None:
        first = self._queue.get()
        while first is not None:
            batch, size = [first], len(first.asked.solutions)
            following: _Waiting | None = first
            while size < self._at_once:
                try:
                    following = self._queue.get_nowait()
                except Empty:
                    break
                if following is None or size + len(following.asked.solutions) > self._at_once:
                    break
                batch.append(following)
                size += len(following.asked.solutions)
            self._score([one for one in batch if one.future.set_running_or_notify_cancel()])
            first = self._queue.get() if following is batch[-1] else following

    def _score(self, batch: Sequence[_Waiting]) -> None:
        if not batch:
            return
        started = time.perf_counter()
        try:
            found = judge_together(self._scorer, [one.asked for one in batch])
        except Exception as error:
            if len(batch) > 1:  # One of them is at fault; the others get their scores.
                for one in batch:
                    self._score([one])
                return
            batch[0].future.set_exception(error)
        else:
            for one, judged in zip(batch, found, strict=True):
                one.future.set_result(judged)
        self.batches += 1
        self.solutions += sum(len(one.asked.solutions) for one in batch)
        self.seconds += time.perf_counter() - started


def judge_together(scorer: Judge, asked: Sequence[Asked]) -> list[Judged]:
    """Return what the model says of several requests, from one call of ``scorer.judge``.

    Raises:
        DataError: A picture cannot be decoded, or a score is no number.
    """
    rows = [(one, steps) for one in asked for steps in one.solutions]
    flat = scorer.judge(
        [one.question for one, _ in rows],
        [steps for _, steps in rows],
        [one.images for one, _ in rows],
    )
    found, start = [], 0
    for one in asked:
        found.append(flat[start : start + len(one.solutions)])
        start += len(one.solutions)
    return found
