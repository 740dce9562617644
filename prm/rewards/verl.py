"""A reward function of verl, for its reward loop.

    compute_score = process_reward(Scorer.from_pretrained("runs/net/model"))

in a file of your own, which ``custom_reward_function.path`` names, with
``custom_reward_function.name=compute_score``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from prm.rewards.scorer import Judgement, Pictures, Scorer
from prm.schema import DataError

_Waiting = tuple[str, str, Pictures, "asyncio.Future[Judgement | DataError]"]


def process_reward(
    scorer: Scorer, *, question: str = "question", images: str = "images"
) -> Callable[..., Awaitable[dict[str, float]]]:
    """Return an async ``compute_score``, which verl calls once for every response.

    It returns ``{"score", "prm_steps", "prm_truncated", "prm_judged"}``, all of them numbers. The
    score of a response that cannot be judged (a blank one, say) is 0, and ``prm_judged`` too.
    Responses that wait at the same time are scored together.

    Args:
        scorer: The reward model.
        question: The key of the question in a row's ``extra_info``.
        images: The key of its pictures there.
    """
    together = _Together(scorer)

    async def compute_score(
        data_source: str,
        solution_str: str,
        ground_truth: Any = None,
        extra_info: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> dict[str, float]:
        about = extra_info or {}
        if not isinstance(about.get(question), str):
            raise ValueError(
                f"expected the question of the row in extra_info[{question!r}], found "
                f"{about.get(question)!r}; write it there, or name its key: process_reward(scorer, "
                "question=...)"
            )
        judged = await together.judge(about[question], solution_str, about.get(images))
        if isinstance(judged, DataError):
            return {"score": 0.0, "prm_steps": 0.0, "prm_truncated": 0.0, "prm_judged": 0.0}
        return {
            "score": judged.score,
            "prm_steps": float(judged.steps),
            "prm_truncated": float(judged.is_truncated),
            "prm_judged": 1.0,
        }

    return compute_score


class _Together:
    """Judges together what is waiting, while the event loop goes on."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._waiting: list[_Waiting] = []
        self._task: asyncio.Task[None] | None = None

    async def judge(self, question: str, solution: str, images: Pictures) -> Judgement | DataError:
        future: asyncio.Future[Judgement | DataError] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, solution, images, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        while self._waiting:
            rows, self._waiting = self._waiting, []
            questions, solutions, images, futures = zip(*rows, strict=True)
            found: Sequence[Judgement | DataError | None] = [None] * len(rows)
            failure: Exception | None = None
            try:
                found = await asyncio.to_thread(self._scorer.judge, questions, solutions, images)
            except Exception as error:
                failure = error
            for future, judged in zip(futures, found, strict=True):
                if future.done():  # its caller has given up
                    continue
                if failure is not None:
                    future.set_exception(failure)
                else:
                    future.set_result(judged)
