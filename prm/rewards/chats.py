"""Questions, pictures and solutions in chat messages, as callers of a reward model pass them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prm.rewards.scorer import Picture

Message = Mapping[str, Any]
Chat = Sequence[Message]

_URL_KEYS = ("image", "image_url", "url", "path")


def question_of(prompt: str | Chat) -> tuple[str, list[Picture]]:
    """Return the question that a prompt asks, and the pictures in it.

    A text is the question. Of messages, the question is all that is said in them but by the system,
    whose instructions are for whoever answers; several turns are joined by a blank line.

    Raises:
        ValueError: A message is malformed.
    """
    if isinstance(prompt, str):
        return prompt, []
    texts, pictures = [], []
    for message in prompt:
        if message.get("role") == "system":
            continue
        text, shown = content_of(message)
        texts.append(text)
        pictures += shown
    return "\n\n".join(texts), pictures


def solution_of(completion: str | Chat) -> str:
    """Return the text of a completion: a text, or the messages of the assistant.

    Raises:
        ValueError: A message is malformed.
    """
    if isinstance(completion, str):
        return completion
    said = [message for message in completion if message.get("role") == "assistant"]
    return "\n\n".join(content_of(message)[0] for message in said)


def content_of(message: Message) -> tuple[str, list[Picture]]:
    """Return the text and the pictures of a message, whose content is a text or a list of parts.

    A part without a picture of its own, ``{"type": "image"}``, stands for one that the caller
    passes elsewhere.

    Raises:
        ValueError: The content is neither, or a part is no text and no image.
    """
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or "", []
    texts: list[str] = []
    pictures: list[Picture] = []
    for part in content if isinstance(content, Sequence) else [content]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            found = next((part[key] for key in _URL_KEYS if part.get(key) is not None), None)
            if kind == "image_url" and isinstance(found, Mapping):
                found = found.get("url")
            pictures += [] if found is None else [found]
        else:
            raise ValueError(
                'expected the content of a message as text, or as parts of type "text" or "image", '
                f"found {str(part)[:80]!r}"
            )
    return "".join(texts), pictures
