"""Reward functions of TRL's ``GRPOTrainer`` (and the trainers that share its rewards, as RLOO).

    reward = grpo_reward(Scorer.from_pretrained("runs/net/model"))
    GRPOTrainer(model, reward_funcs=[reward], train_dataset=data, args=...)

TRL calls ``f(prompts=..., completions=..., **columns)`` with the columns of the data set. It
expects a number, or None for no opinion, for every completion.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from prm.rewards.chats import Chat, question_of, solution_of
from prm.rewards.scorer import Judgement, Pictures, Scorer
from prm.schema import DataError

Rewards = list[float | None]

_IMAGE_COLUMNS = ("images", "image")
_ADDED = ("completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
"""What TRL passes beside the columns of the data set."""


def grpo_reward(
    scorer: Scorer, *, question: str | None = None, images: str | None = None
) -> Callable[..., Rewards]:
    """Return a reward function: the score of every completion by the model's aggregation.

    A blank completion has the reward 0. One that cannot be judged (it imitates the chat template,
    or with ``too_long="refuse"`` is longer than the reward model's context) has the reward None,
    which TRL leaves out, and a warning says why. The share of these is logged as
    ``process_reward/unjudged``, that of completions whose first steps alone were judged as
    ``process_reward/truncated``, and the table of completions has the column ``prm_truncated``.

    Args:
        scorer: The reward model. ``too_long="truncate"`` gives long completions a reward, too.
        question: The column of the question. None means what the prompt says, system turns left
            out.
        images: The column of the pictures. None means "images" or "image", whichever there is,
            and else the pictures in the prompt.
    """

    def process_reward(
        prompts: Sequence[str | Chat], completions: Sequence[str | Chat], **columns: Any
    ) -> Rewards:
        rows = _rows(prompts, completions, columns, question, images)
        return _rewards(rows[1], scorer.judge(*rows), columns)

    return process_reward


def async_grpo_reward(
    scorer: Scorer, *, question: str | None = None, images: str | None = None
) -> Callable[..., Awaitable[Rewards]]:
    """Return the reward function of ``grpo_reward`` as a coroutine function.

    TRL awaits these together, so that other reward functions, which wait for a server, say, run at
    the same time.
    """

    async def process_reward(
        prompts: Sequence[str | Chat], completions: Sequence[str | Chat], **columns: Any
    ) -> Rewards:
        rows = _rows(prompts, completions, columns, question, images)
        return _rewards(rows[1], await asyncio.to_thread(scorer.judge, *rows), columns)

    return process_reward


def _rows(
    prompts: Sequence[str | Chat],
    completions: Sequence[str | Chat],
    columns: dict[str, Any],
    question: str | None,
    images: str | None,
) -> tuple[list[str], list[str], list[Pictures]]:
    """Return the question, the solution and the pictures of every completion."""
    for name in (question, images):
        if name is not None and name not in columns:
            known = ", ".join(repr(each) for each in columns if each not in _ADDED) or "none"
            raise ValueError(f"expected a column {name!r} in the data set, found {known}")
    asked = [question_of(prompt) for prompt in prompts]
    questions = [text for text, _ in asked] if question is None else list(columns[question])
    column = images or next((n for n in _IMAGE_COLUMNS if columns.get(n) is not None), None)
    pictures: list[Pictures] = [shown or None for _, shown in asked]
    if column is not None:
        pictures = list(columns[column])
    return questions, [solution_of(completion) for completion in completions], pictures


def _rewards(
    solutions: Sequence[str], judged: Sequence[Judgement | DataError], columns: dict[str, Any]
) -> Rewards:
    rewards: Rewards = []
    refused = []
    for solution, one in zip(solutions, judged, strict=True):
        if isinstance(one, Judgement):
            rewards.append(one.score)
        elif not solution.strip():
            rewards.append(0.0)  # nothing that could be right
        else:
            rewards.append(None)
            refused.append(one)
    cut = [isinstance(one, Judgement) and one.is_truncated for one in judged]
    if refused:
        warnings.warn(
            f"{len(refused)} of {len(judged)} completions have no reward: {refused[0]}",
            stacklevel=3,
        )
    if (log_metric := columns.get("log_metric")) is not None:
        log_metric("process_reward/unjudged", len(refused) / len(judged))
        log_metric("process_reward/truncated", sum(cut) / len(judged))
    if (log_extra := columns.get("log_extra")) is not None:
        log_extra("prm_truncated", cut)
    return rewards
