"""How other servers give our step scores: what they are asked, and what of their answers is read.

The score of step k is p("+") at ``label_positions[k]``, by default by the softmax over the two
labels alone. Three ways lead to it:

- vLLM's ``/generative_scoring`` and SGLang's ``/v1/score`` give the softmax over given label tokens
  at the next token of ``query + item``, both lists of token ids: query is what stands before the
  first label, and an item for every step goes on from there. Text only.
- vLLM's ``/v1/chat/completions`` with ``prompt_logprobs`` gives log p of every token of the prompt
  and of the likeliest others. With "+" in every slot, the conversation as the model was trained on
  it, the token of slot k gives log p("+"), and "-" is among the others unless it is unlikely.
- ``bilevel-prm serve`` gives the scores themselves.

Written from vLLM's sources of 2026 (``entrypoints/openai/generative_scoring``, its documentation
0.22.1, ``chat_completion/protocol.py``) and SGLang's ``serving_score.py``. Not run with either.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

from prm.conventions import LAYOUT, Conventions
from prm.data_urls import embedded, read_bytes, to_url
from prm.inputs.collate import EncodedExample
from recipes.run.errors import RunError

MOST_LIKELY = 20
"""How many of the likeliest tokens vLLM is asked for: the most that it gives by default
(``--max-logprobs``)."""
_SHOWN = 300


class Between(NamedTuple):
    """A step score of which a server tells the bounds; they are equal if it tells the score."""

    low: float
    high: float


@dataclass(frozen=True)
class Remote:
    """A server.

    Attributes:
        url: Its address, without a path.
        model: The name of the model there.
        token: What it wants to be shown, or None.
        seconds: How long it may take for an answer.
    """

    url: str
    model: str
    token: str | None = None
    seconds: float = 60.0

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the decoded answer to a request in JSON.

        Raises:
            RunError: The server cannot be reached, refuses, or answers no JSON.
        """
        where = self.url.rstrip("/") + path
        headers = {"Content-Type": "application/json"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        request = Request(where, json.dumps(body).encode(), headers)
        try:
            # No proxies: a server for one's own scores stands nearby.
            with build_opener(ProxyHandler({})).open(request, timeout=self.seconds) as answer:
                return json.loads(answer.read())
        except HTTPError as error:
            with error:  # an answer that was not read to its end keeps its connection open
                said = error.read(_SHOWN).decode(errors="replace")
            raise RunError(f"{where}: answered {error.code} {error.reason}: {said}") from error
        except (URLError, TimeoutError, ConnectionError) as error:
            why = error.reason if isinstance(error, URLError) else error
            raise RunError(f"{where}: no answer ({why}); is the server up?") from error
        except ValueError as error:
            raise RunError(f"{where}: expected an answer in JSON, found {error}") from error


Ask = Callable[[Remote, EncodedExample, Conventions], list[Between]]
"""Returns the step scores that a server has for a solution."""


def by_generative_scoring(remote: Remote, row: EncodedExample, usage: Conventions) -> list[Between]:
    """Return the step scores from vLLM's ``/generative_scoring``.

    Raises:
        RunError: The server refuses, or its answer has another form.
    """

    def scores(answer: Any) -> list[Between]:
        items = sorted(answer["data"], key=lambda item: item["index"])
        return [_score(item["score"]) for item in _all_of(items, row)]

    path = "/generative_scoring"
    return _read(path, remote.post(path, _next_token_question(remote, row, usage)), scores)


def by_sglang(remote: Remote, row: EncodedExample, usage: Conventions) -> list[Between]:
    """Return the step scores from SGLang's ``/v1/score``, which has one for each label.

    Raises:
        RunError: The server refuses, or its answer has another form.
    """
    path = "/v1/score"
    answer = remote.post(path, _next_token_question(remote, row, usage))
    return _read(path, answer, lambda it: [_score(plus) for plus, _ in _all_of(it["scores"], row)])


def _next_token_question(
    remote: Remote, row: EncodedExample, usage: Conventions
) -> Mapping[str, Any]:
    """Return the request that both understand; the prompts end at the label positions."""
    ids = row.input_ids.tolist()
    ends = [position + 1 for position in row.label_positions.tolist()]
    start = ends[0] - 1  # An item has at least one token.
    return {
        "model": remote.model,
        "query": ids[:start],
        "items": [ids[start:end] for end in ends],
        "label_token_ids": [usage.plus_id, usage.minus_id],
        "apply_softmax": usage.probability == "labels",
        "item_first": False,
    }


def by_chat(remote: Remote, row: EncodedExample, usage: Conventions) -> list[Between]:
    """Return the step scores from the log-probabilities of the tokens of a conversation.

    The prompt of the server must be ours, token for token: its own chat template and image
    processor make it.

    Raises:
        RunError: The server refuses, its prompt is another, or its answer has another form.
    """
    body = {
        "model": remote.model,
        "messages": _messages(row, usage),
        "add_generation_prompt": False,
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": MOST_LIKELY,
        "return_token_ids": True,
    }
    path = "/v1/chat/completions"
    ours = row.input_ids.tolist()

    def scores(answer: Any) -> list[Between]:
        theirs, likely = answer["prompt_token_ids"], answer["prompt_logprobs"]
        for place, token in enumerate(ours):
            if theirs[place : place + 1] != [token]:
                raise RunError(
                    f"{remote.url}{path}: its prompt differs from ours at token {place} of "
                    f"{len(ours)} (solution {row.example.id!r}): ours {ours[place : place + 8]}, "
                    f"theirs {theirs[place : place + 8]}; give the server the chat template, the "
                    "system prompt and the number of tiles that the model was trained with"
                )
        slots = [position + 1 for position in row.label_positions.tolist()]
        return [_from_likely(likely[slot], usage) for slot in slots]

    return _read(path, remote.post(path, body), scores)


def _messages(row: EncodedExample, usage: Conventions) -> list[Mapping[str, Any]]:
    """Return the conversation with "+" in every slot, the pictures in front of the first turn."""
    turns: list[Mapping[str, Any]] = []
    if usage.system_prompt is not None:
        turns.append({"role": "system", "content": usage.system_prompt})
    example = row.example
    for number, step in enumerate(example.steps):
        layout = LAYOUT["turn" if number else "first_turn"]
        content: Any = layout.format(question=example.question, step=step.text)
        if number == 0 and example.images:
            urls = [to_url(embedded(read_bytes(path))) for path in example.images]
            pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
            content = [*pictures, {"type": "text", "text": content}]
        turns.append({"role": "user", "content": content})
        turns.append({"role": "assistant", "content": "+"})
    return turns


def _from_likely(likely: Mapping[str, Any], usage: Conventions) -> Between:
    """Return the score from {token id: {"logprob": ...}} of the slot, whose token is "+".

    p("+") = 1 / (1 + exp(l₋ - l₊)). If "-" is not among the likeliest tokens, l₋ is at most the
    least of theirs.
    """
    plus = float(likely[str(usage.plus_id)]["logprob"])
    if usage.probability == "vocabulary":
        return _score(math.exp(plus))
    minus = likely.get(str(usage.minus_id))
    if minus is not None:
        return _score(_sigmoid(plus - float(minus["logprob"])))
    least = min(float(entry["logprob"]) for entry in likely.values())
    return Between(_sigmoid(plus - least), 1.0)


def by_bilevel_prm(remote: Remote, row: EncodedExample, usage: Conventions) -> list[Between]:
    """Return the step scores of ``bilevel-prm serve``.

    Raises:
        RunError: The server refuses, or its answer has another form.
    """
    example = row.example
    body = {
        "question": example.question,
        "steps": [step.text for step in example.steps],
        "images": [base64.b64encode(read_bytes(path)).decode() for path in example.images],
    }
    answer = remote.post("/score", body)
    return _read(
        "/score", answer, lambda it: [_score(score) for score in _all_of(it["step_scores"], row)]
    )


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def _score(value: Any) -> Between:
    score = float(value)
    if not 0 <= score <= 1:
        raise ValueError(f"a score of {value}")
    return Between(score, score)


def _all_of(found: Sequence[Any], row: EncodedExample) -> Sequence[Any]:
    steps = len(row.label_positions)
    if len(found) != steps:
        raise ValueError(f"{len(found)} scores for {steps} steps")
    return found


def _read(path: str, answer: Any, scores: Callable[[Any], list[Between]]) -> list[Between]:
    """Return the scores in an answer, whose form is not known to be right.

    Raises:
        RunError: It has another form; the error shows its beginning.
    """
    try:
        return scores(answer)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise RunError(
            f"{path}: expected the step scores of a solution, found {type(error).__name__}: "
            f"{error} in {json.dumps(answer)[:_SHOWN]}"
        ) from error
