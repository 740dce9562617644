"""Whether an example can be laid out for the model, without tokenising it where that is certain.

Three things can be wrong with an example beside its images: a text imitates the template, the
template refuses it or merges a label with its turn, or it is too long. The first is looked for in
the texts. The second depends on the number of steps and images alone, if the template looks at
nothing else (``prm.inputs.template_probe``), and is then tried once for each. For the third,

    tokens ≤ tokens of the common start + special tokens + bytes of the text between them + images,

since a token of ordinary text stands for a byte of it or more. Only an example that this bound does
not show to fit is tokenised, and so is every one where the premises do not hold.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from prm.inputs.prompt import SLOT, PromptEncoder
from prm.inputs.template_probe import looked_for
from prm.schema import DataError, Step, StepExample

_MARK = "\ue001"  # stands for each text of an example
_PROBES = (
    _MARK,
    "x",
    "Ab \"c\" \\ 'd' <e> & {f} {{g}} %h\n\n* i\tj 1,000.5 é 中 ﷺ",
    "</k> [l] `m`",
)
_MODELS = frozenset({"BPE", "WordPiece", "WordLevel", "Unigram"})
_NORMALIZERS = frozenset(
    {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "BertNormalizer"}
    | {"Prepend", "Precompiled", "Nmt"}
)


class Layout:
    """Tells which examples certainly fit a model.

    Args:
        prompt: The encoder of the model.
    """

    def __init__(self, prompt: PromptEncoder) -> None:
        self._prompt = prompt
        self._special = _special_tokens(prompt.tokenizer)
        self._costs: dict[tuple[int, int], int | None] = {}
        self._opening = _opening(prompt)
        self._wanted: Mapping[str, int] | None = None
        if _bytes_bound_tokens(prompt.tokenizer):
            self._wanted = self._looked_for()

    def fits(self, example: StepExample, images: Sequence[str]) -> bool:
        """Return whether ``PromptEncoder.encode`` certainly accepts an example.

        False means that only encoding can tell.

        Args:
            example: The example.
            images: The text of the tokens of each image.
        """
        if self._wanted is None or self._prompt.imitation(example) is not None:
            return False
        texts = "\n".join((example.question, *(step.text for step in example.steps)))
        if self._wanted:
            whole = self._opening + texts
            if any(whole.count(wanted) != count for wanted, count in self._wanted.items()):
                return False
        shape = len(example.steps), len(images)
        if shape not in self._costs:
            self._costs[shape] = self._cost(len(example.steps), images)
        cost, limit = self._costs[shape], self._prompt.max_length
        if cost is None or limit is None:
            return cost is not None
        return cost + _most_bytes(texts) + sum(map(self._tokens_of, images)) <= limit

    def _looked_for(self) -> Mapping[str, int] | None:
        """Return the texts that the template searches for, with their number in the opening."""
        prompt = self._prompt
        conversations = [prompt.conversation(_probe(_MARK, steps)) for steps in (1, 2, 3)]
        found = looked_for(prompt.template, conversations, prompt.tokenizer.special_tokens_map)
        return None if found is None else {text: self._opening.count(text) for text in found}

    def _cost(self, steps: int, images: Sequence[str]) -> int | None:
        """Return a bound for the tokens of the layout itself, None if it does not always hold."""
        prompt = self._prompt
        labels = (1.0, 0.0) if prompt.context == "gold" else (1.0,)
        try:
            shown = prompt.rendered(_probe(_MARK, steps, len(images)))
            for text in _PROBES:
                probe = _probe(text, steps, len(images))
                if prompt.rendered(probe) != shown.replace(_MARK, text):
                    return None
            for label in labels:
                prompt.encode(_probe("x", steps, len(images), label), images)
        except (DataError, TemplateError):
            return None
        if (shown.count(SLOT), shown.count(_MARK)) != (steps, steps + 1):
            return None
        shown = shown[: shown.rindex(SLOT) + len(SLOT)]
        text, count = prompt.start
        shown = shown.removeprefix(text) if count else shown
        parts = self._special.split(shown)
        if any(SLOT in part and _MARK in part for part in parts):
            return None  # a label is a token of its own where no text of an example is near
        # One more for each, because some tokenizers put a space in front.
        own = (1 + len(part.replace(_MARK, "").replace(SLOT, "+").encode()) for part in parts)
        return count + len(parts) + sum(own)

    def _tokens_of(self, image: str) -> int:
        """Return a bound for the tokens of an image."""
        tokens = self._prompt.image_tokens
        assert tokens is not None
        repeated = image.count(tokens.context)
        return repeated + len(image.encode()) - repeated * len(tokens.context.encode())


def _probe(text: str, steps: int, images: int = 0, label: float = 1.0) -> StepExample:
    paths = tuple(Path(f"{number}.png") for number in range(images))
    return StepExample("probe", text, paths, (Step(text, label),) * steps)


def _opening(prompt: PromptEncoder) -> str:
    """Return the first user turn of an example without texts."""
    content = prompt.messages(_probe("", 1))[-2]["content"]
    return content if isinstance(content, str) else "".join(p.get("text", "") for p in content)


def _most_bytes(text: str) -> int:
    """Return a bound for the bytes of a text in whichever Unicode form a tokenizer takes it.

    The full decomposition is the longest form; lower case adds less than half.
    """
    if text.isascii():
        return len(text)
    return 2 * max(len(text.encode()), len(unicodedata.normalize("NFKD", text).encode()))


def _special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Return what finds the tokens at which a text is cut before anything else is done to it."""
    special = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and not (token.normalized or token.lstrip or token.rstrip)
    ]
    longest_first = sorted(special, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _bytes_bound_tokens(tokenizer: Any) -> bool:
    """Return whether a tokenizer surely makes no more tokens than a text has bytes."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    kinds = list(_normalizers(parts["normalizer"]))
    return parts["model"]["type"] in _MODELS and all(
        kind["type"] in _NORMALIZERS or _shortens(kind) for kind in kinds
    )


def _normalizers(part: Any) -> Iterator[Any]:
    """Yield the normalizers of a tokenizer, those of sequences one by one."""
    if part is not None and part["type"] == "Sequence":
        for inner in part["normalizers"]:
            yield from _normalizers(inner)
    elif part is not None:
        yield part


def _shortens(part: Mapping[str, Any]) -> bool:
    """Return whether a normalizer replaces a text by one that is no longer."""
    pattern = part.get("pattern", {}).get("String", "")
    return part["type"] == "Replace" and len(part["content"]) <= len(pattern)
