"""Reward models of reward_hub and its_hub, whose searches (best-of-N, beams, particles) call them.

    prm = RewardHubPRM(Scorer.from_pretrained("runs/net/model"))
    prm.score([{"role": "user", "content": question}, {"role": "assistant", "content": solution}])

``RewardHubPRM`` has the ``score`` of reward_hub's process reward models, ``ItsHubPRM`` the
``score`` and ``ascore`` that its_hub calls. Both libraries cut solutions at blank lines, and so
does this module, so that a step is what they count as one.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prm.rewards.chats import Chat, question_of, solution_of
from prm.rewards.scorer import Judgement, Pictures, Scorer, all_judged

SEPARATOR = "\n\n"


@dataclass(frozen=True)
class PRMResult:
    """What is known of a solution, by the names of ``reward_hub.base.PRMResult``.

    Attributes:
        step_scores: The step scores.
        product: Their product.
        min: The smallest.
        last: The last.
        score: The score by the aggregation that was asked for.
    """

    step_scores: list[float]
    product: float
    min: float
    last: float
    score: float

    @classmethod
    def of(cls, judged: Judgement, method: str) -> PRMResult:
        """Return the result of a solution, by "prod", "min", "last" or "model".

        Raises:
            ValueError: It is another aggregation.
        """
        steps = list(judged.step_scores)
        product, least, last = math.prod(steps), min(steps), steps[-1]
        known = {"prod": product, "min": least, "last": last}
        if method != "model" and method not in known:
            raise ValueError(
                f"expected aggregation_method model, {', '.join(known)}, found {method!r}"
            )
        return cls(steps, product, least, last, known.get(method, judged.score))


class RewardHubPRM:
    """A process reward model with the interface of reward_hub.

    Args:
        scorer: The reward model.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def score(
        self,
        messages: Sequence[Chat] | Chat,
        step_separator: str = SEPARATOR,
        aggregation_method: Any = "last",
        return_full_prm_result: bool = False,
        max_input_tokens: int | None = None,
    ) -> list[Any]:
        """Return the score of every conversation, whose last message is the solution.

        Args:
            messages: A conversation, or several.
            step_separator: What stands between the steps of a solution.
            aggregation_method: "prod", "min" or "last", or "model": by the conventions of the
                model; or the member of reward_hub's ``AggregationMethod`` of this value.
            return_full_prm_result: Whether to return objects that hold the step scores, too.
            max_input_tokens: Accepted and not read: how long a solution may be the model says.

        Raises:
            DataError: A solution cannot be judged.
            ValueError: The aggregation is unknown, or a message is malformed.
        """
        chats = [messages] if messages and isinstance(messages[0], Mapping) else messages
        method = getattr(aggregation_method, "value", aggregation_method)
        judged = _judged(self.scorer, chats, step_separator)  # type: ignore[arg-type]
        results = [PRMResult.of(one, method) for one in judged]
        return results if return_full_prm_result else [result.score for result in results]


class ItsHubPRM:
    """A process reward model with the interface of its_hub (``AbstractProcessRewardModel``).

    Args:
        scorer: The reward model.
        aggregation_method: As in ``RewardHubPRM.score``.
        images: The pictures of the question, where the prompt does not hold them.
    """

    def __init__(
        self, scorer: Scorer, aggregation_method: str = "model", images: Pictures = None
    ) -> None:
        self.scorer = scorer
        self.aggregation_method = aggregation_method
        self.images = images

    def score(self, prompt_or_messages: Any, steps: str | Sequence[str]) -> Any:
        """Return the score of a response, or of each of several, to one prompt.

        Args:
            prompt_or_messages: A text, a list of messages, or its_hub's ``ChatMessages``.
            steps: A response as far as it is written, or several.

        Raises:
            DataError: A response cannot be judged.
            ValueError: The aggregation is unknown, or a message is malformed.
        """
        prompt = prompt_or_messages
        if hasattr(prompt, "to_chat_messages"):
            prompt = prompt.to_chat_messages()
        if not isinstance(prompt, str):
            prompt = [_plain(message) for message in prompt]
        responses = [steps] if isinstance(steps, str) else list(steps)
        answers = [{"role": "assistant", "content": response} for response in responses]
        ask = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        chats = [[*ask, answer] for answer in answers]
        judged = _judged(self.scorer, chats, SEPARATOR, self.images)
        scores = [PRMResult.of(one, self.aggregation_method).score for one in judged]
        return scores[0] if isinstance(steps, str) else scores

    async def ascore(self, prompt_or_messages: Any, steps: str | Sequence[str]) -> Any:
        """Return what ``score`` does, computed in a thread."""
        return await asyncio.to_thread(self.score, prompt_or_messages, steps)


def _judged(
    scorer: Scorer, chats: Sequence[Chat], separator: str, images: Pictures = None
) -> list[Judgement]:
    questions, pictures = [], []
    for chat in chats:
        question, shown = question_of(chat[:-1])
        questions.append(question)
        pictures.append(shown or images)
    solutions = [
        [step for step in solution_of(chat[-1:]).split(separator) if step.strip()] for chat in chats
    ]
    return all_judged(scorer.judge(questions, solutions, pictures))


def _plain(message: Any) -> Mapping[str, Any]:
    """Return a message as a mapping; its_hub's ``ChatMessage`` has attributes."""
    if isinstance(message, Mapping):
        return message
    return {"role": message.role, "content": message.content}
