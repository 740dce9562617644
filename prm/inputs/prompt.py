"""The multi-turn layout in which a solution is judged, and the position of each judgement.

    system:     <instruction>
    user:       <images> ### Question: ... ### Solution Process: <first step>
    assistant:  + or -
    user:       <second step>
    assistant:  + or -          ...

This is the layout of VisualPRM (arXiv 2503.10291). The turns are rendered by the tokenizer's own
chat template. The label of step k is predicted at the token *before* the k-th assistant slot, so
the sequence stops there for the last step: nothing after it can change a score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Int32, Int64
from jinja2 import TemplateError
from torch import Tensor

from prm.inputs.tokens import ImageTokens, label_tokens
from prm.names import Context, TooLong
from prm.schema import DataError, Step, StepExample

SYSTEM_PROMPT = (
    "You are a strict and careful judge of solutions to problems with pictures. The first turn "
    "gives the question and the first step of a solution; every further turn gives the next step. "
    "Look at the picture, follow the reasoning, and judge the newest step in the light of "
    "everything before it: is what it reads off the picture true, is its calculation or inference "
    "valid, and does it still lead to the right answer? Reply to every turn with one symbol and "
    'nothing else: "+" if the step is right, "-" if it is wrong.'
)
"""System instruction used when no other is given."""

SLOT = "\ue000"
"""Private-use character that marks an assistant slot in the rendered template."""


@dataclass(frozen=True)
class _Start:
    """The text that every example begins with.

    Attributes:
        text: The text.
        token: The token, as text, that follows it.
        ids: Its tokens.
    """

    text: str
    token: str
    ids: list[int]


class PromptEncoder:
    """Turns examples into token ids and label positions.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        image_tokens: The tokens of an image. None for a model without images.
        context: The content of earlier assistant slots. Use the same to train and to score.
        system_prompt: The text of the system turn. None means no system turn.
        max_length: The longest accepted sequence in tokens. None means any length.
        too_long: What a longer one leads to: an error, or that its first steps, as many as fit, are
            encoded. The labels of the others then have no position.
        chat_template: The template of the model's processor. None means the tokenizer's own. A
            template whose turns are lists of typed parts places the images itself.

    Raises:
        ValueError: The tokenizer or its template does not support this layout.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        image_tokens: ImageTokens | None = None,
        context: Context = "plus",
        system_prompt: str | None = SYSTEM_PROMPT,
        max_length: int | None = None,
        too_long: TooLong = "refuse",
        chat_template: str | None = None,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"expected a fast tokenizer (label tokens are located by their place in the text), "
                f"found {type(tokenizer).__name__}"
            )
        if not (chat_template or tokenizer.chat_template):
            raise ValueError(
                "expected a tokenizer with a chat template, found none; set "
                "tokenizer.chat_template to the one the model was trained with"
            )
        if context not in ("plus", "gold", "masked"):
            raise ValueError(f"expected context 'plus', 'gold' or 'masked', found {context!r}")
        if too_long not in ("refuse", "truncate"):
            raise ValueError(f"expected too_long 'refuse' or 'truncate', found {too_long!r}")
        if context == "masked" and tokenizer.pad_token is None:
            raise ValueError(
                "expected a tokenizer with a padding token for context='masked', found none; set "
                "tokenizer.pad_token or choose another context"
            )
        self.tokenizer = tokenizer
        self.labels = label_tokens(tokenizer)
        self.image_tokens = image_tokens
        self.context = context
        self.system_prompt = system_prompt
        self.max_length = max_length
        self.too_long = too_long
        self.chat_template = chat_template
        self._typed = chat_template is not None and self._takes_parts()
        self._start: _Start | None = None
        self._structure = self._check_template()
        self._start = self._common_start()

    def messages(self, example: StepExample) -> list[dict[str, Any]]:
        """Return the conversation of an example, with its assistant slots filled by ``context``."""
        return self._turns(example, [self._slot(step.label) for step in example.steps])

    def text(self, example: StepExample) -> str:
        """Return the text up to the last scored position, with one placeholder per image."""
        pieces = self._pieces(example)
        slots = [self._slot(step.label) for step in example.steps[:-1]]
        return "".join(a + b for a, b in zip(pieces, [*slots, ""], strict=True))

    def conversation(self, example: StepExample) -> list[dict[str, Any]]:
        """Return the conversation of an example, with ``SLOT`` as what the assistant says."""
        return self._turns(example, [SLOT] * len(example.steps))

    def rendered(self, example: StepExample) -> str:
        """Return the whole text of an example, with open slots.

        Raises:
            DataError: The example has images and the model takes none.
            TemplateError: The template refuses the conversation.
        """
        return self._render(self.conversation(example))

    def imitation(self, example: StepExample) -> DataError | None:
        """Return the error of a text that holds a token that the template is made of."""
        whole = "\0".join((example.question, *(step.text for step in example.steps)))
        if not any(token in whole for token in self._structure):
            return None
        for field, text in _texts(example):
            for token in self._structure:
                if token in text:
                    return DataError(
                        expected="text without the tokens that the chat template is made of",
                        found=repr(token),
                        example=example.id,
                        field=field,
                        remedy="remove it or write it differently",
                    )
        return None

    @property
    def template(self) -> str:
        """The chat template."""
        return str(self.chat_template or self.tokenizer.chat_template)

    @property
    def start(self) -> tuple[str, int]:
        """The text that every example begins with, and the number of its tokens."""
        return ("", 0) if self._start is None else (self._start.text, len(self._start.ids))

    def encode(
        self, example: StepExample, images: Sequence[str] = ()
    ) -> tuple[Int32[Tensor, " seq"], Int64[Tensor, " steps"]]:
        """Return token ids and label positions.

        Args:
            example: The example.
            images: The text of the tokens of each image (``ImageTokens.expanded``).

        Returns:
            The tensors ``input_ids`` [seq] (int32) and ``label_positions`` [steps] (long). The
            logits at position ``label_positions[k]`` predict the label of step k. With ``too_long``
            "truncate" a sequence that is too long has positions for its first steps alone.

        Raises:
            DataError: The text imitates the template, the example has images and the model takes
                none, or the sequence is too long.
        """
        (result,) = self.encode_many([example], [images])
        if isinstance(result, DataError):
            raise result
        return result

    def encode_many(
        self, examples: Sequence[StepExample], images: Sequence[Sequence[str]]
    ) -> list[tuple[Int32[Tensor, " seq"], Int64[Tensor, " steps"]] | DataError]:
        """Return what ``encode`` does of every example, or the ``DataError`` that it raises.

        The tokenizer gets all examples at once, and the text that all begin with only once.

        Args:
            examples: The examples.
            images: The text of the tokens of each image, for every example.
        """
        texts: list[tuple[list[str], list[str]] | DataError] = []
        rendered = iter(self._rendered(examples))
        for example, expanded in zip(examples, images, strict=True):
            if len(expanded) != len(example.images):
                raise ValueError(
                    f"expected each of the {len(example.images)} images of example "
                    f"{example.id!r}, found {len(expanded)}"
                )
            try:
                pieces = self._pieces(example, next(rendered))
                if expanded:  # All images are in the first turn.
                    pieces[0] = self._expand(pieces[0], expanded)
                texts.append((pieces, [self._slot(step.label) for step in example.steps]))
            except DataError as error:
                texts.append(error)
        tokenised = self._tokenised(
            [
                "".join(piece + slot for piece, slot in zip(*text, strict=True))
                for text in texts
                if not isinstance(text, DataError)
            ]
        )
        results: list[tuple[Tensor, Tensor] | DataError] = []
        for example, expanded, text in zip(examples, images, texts, strict=True):
            if isinstance(text, DataError):
                results.append(text)
                continue
            try:
                results.append(self._located(example, expanded, *text, *next(tokenised)))
            except DataError as error:
                results.append(error)
        return results

    def _tokenised(self, texts: list[str]) -> Iterator[tuple[list[int], Callable[[int], int]]]:
        """Yield the token ids of each text, and the function from a character to its token."""
        if not texts:
            return
        start = self._start
        shared = [start is not None and text.startswith(start.text + start.token) for text in texts]
        encoding = self.tokenizer(
            [
                text[len(start.text) :] if start is not None and cut else text
                for text, cut in zip(texts, shared, strict=True)
            ],
            add_special_tokens=False,
            return_attention_mask=False,
        )
        for number, cut in enumerate(shared):
            ids = encoding["input_ids"][number]
            characters = tokens = 0
            if start is not None and cut:
                characters, tokens = len(start.text), len(start.ids)
                ids = [*start.ids, *ids]

            def token_at(
                character: int, number: int = number, before: int = characters, skip: int = tokens
            ) -> int:
                token = encoding.char_to_token(number, character - before)
                return 0 if token is None else token + skip

            yield ids, token_at

    def _located(
        self,
        example: StepExample,
        images: Sequence[str],
        pieces: Sequence[str],
        slots: Sequence[str],
        ids: list[int],
        token_at: Callable[[int], int],
    ) -> tuple[Int32[Tensor, " seq"], Int64[Tensor, " steps"]]:
        positions = []
        start = 0
        for number, (piece, slot) in enumerate(zip(pieces, slots, strict=True)):
            start += len(piece)
            token = token_at(start)
            if not token or ids[token] != self._slot_id(slot):
                raise DataError(
                    expected=f"the label {slot!r} to be a token of its own, after another token",
                    found=f"{self.tokenizer.convert_ids_to_tokens(ids[token])!r}",
                    example=example.id,
                    field=f"steps[{number}]",
                    remedy="use a tokenizer and chat template that keep label and turn apart",
                )
            positions.append(token - 1)
            start += len(slot)
        ids = ids[: positions[-1] + 1]
        self._check_images(ids, images)
        if self.max_length is not None and len(ids) > self.max_length:
            fitting = [position for position in positions if position < self.max_length]
            if self.too_long == "refuse" or not fitting:
                what = "" if self.too_long == "refuse" else " up to the end of the first step"
                raise DataError(
                    expected=f"at most {self.max_length} tokens{what}",
                    found=f"{positions[0] + 1 if what else len(ids)}",
                    example=example.id,
                    remedy="lower max_patches if it has images, shorten the solution, "
                    + (
                        ""
                        if what
                        else "keep its first steps (--too-long truncate, but of a meta set), "
                    )
                    + "or leave it out (--on-bad-row skip)",
                )
            ids, positions = ids[: fitting[-1] + 1], fitting
        return torch.tensor(ids, dtype=torch.int32), torch.tensor(positions)

    def _expand(self, text: str, images: Sequence[str]) -> str:
        """Replace the placeholders of the images by their tokens."""
        assert self.image_tokens is not None
        between = text.split(self.image_tokens.context)
        if len(between) != len(images) + 1:
            raise ValueError(
                f"expected a chat template that renders {len(images)} image placeholders "
                f"{self.image_tokens.context!r} once each, found {len(between) - 1}; set "
                "tokenizer.chat_template to one that leaves the text of a turn as it is"
            )
        return "".join(a + b for a, b in zip(between, [*images, ""], strict=True))

    def _check_images(self, ids: list[int], images: Sequence[str]) -> None:
        tokens = self.image_tokens
        if tokens is None or not tokens.per_tile:
            return
        expected = sum(image.count(tokens.context) for image in images)
        count = ids.count(tokens.context_id)
        if count != expected:
            raise ValueError(
                f"expected {expected} tokens {tokens.context!r} for {len(images)} images, found "
                f"{count} after tokenisation; check that the tokenizer has it as a special token"
            )

    def _turns(self, example: StepExample, slots: Sequence[str]) -> list[dict[str, Any]]:
        if example.images and self.image_tokens is None:
            raise DataError(
                expected="an example without images (the model takes none)",
                found=f"{len(example.images)}",
                example=example.id,
                field="images",
                remedy="use an image-text-to-text model",
            )
        opening = f"### Question:\n{example.question}\n\n### Solution Process:\n"
        turns = []
        if self.system_prompt is not None:
            turns.append(self._turn("system", self.system_prompt))
        for number, (step, slot) in enumerate(zip(example.steps, slots, strict=True)):
            if number == 0:
                turns.append(self._turn("user", opening + step.text, len(example.images)))
            else:
                turns.append(self._turn("user", step.text))
            turns.append(self._turn("assistant", slot))
        return turns

    def _turn(self, role: str, text: str, images: int = 0) -> dict[str, Any]:
        if self._typed:
            parts = [{"type": "image"}] * images
            return {"role": role, "content": [*parts, {"type": "text", "text": text}]}
        if images:
            assert self.image_tokens is not None
            text = (self.image_tokens.context + self.image_tokens.separator) * images + text
        return {"role": role, "content": text}

    def _rendered(self, examples: Sequence[StepExample]) -> Sequence[str | None]:
        """Return the texts of all examples with open slots, or None for each if one has none."""
        try:
            turns = [self._turns(example, [SLOT] * len(example.steps)) for example in examples]
            return self._render_all(turns)
        except (DataError, TemplateError):
            return [None] * len(examples)

    def _pieces(self, example: StepExample, rendered: str | None = None) -> list[str]:
        """Return the text between each assistant slot and the previous one, as ``rendered``."""
        if (error := self.imitation(example)) is not None:
            raise error
        try:
            if rendered is None:
                rendered = self.rendered(example)
            pieces = rendered.split(SLOT)
        except TemplateError as error:
            raise DataError(
                expected="turns that the chat template renders",
                found=f"its refusal: {error}",
                example=example.id,
                remedy="change the text that it refuses, or use another chat template",
            ) from error
        if len(pieces) != len(example.steps) + 1:
            raise DataError(
                expected=f"{len(example.steps)} scored positions, one per step",
                found=f"{len(pieces) - 1}",
                example=example.id,
                remedy="use a chat template that renders every assistant turn once",
            )
        return pieces[:-1]

    def _slot(self, label: float | None) -> str:
        if self.context == "masked":
            return str(self.tokenizer.pad_token)
        if self.context == "gold" and label is not None:
            return "+" if label >= 0.5 else "-"
        return "+"

    def _slot_id(self, slot: str) -> int:
        if self.context == "masked":
            return int(self.tokenizer.pad_token_id)
        return self.labels.plus_id if slot == "+" else self.labels.minus_id

    def _render(self, turns: list[dict[str, Any]], *, generate: bool = False) -> str:
        (rendered,) = self._render_all([turns], generate=generate)
        return rendered

    def _render_all(
        self, conversations: list[list[dict[str, Any]]], *, generate: bool = False
    ) -> list[str]:
        try:
            rendered: list[str] = self.tokenizer.apply_chat_template(
                conversations,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=generate,
            )
        except TemplateError:
            raise
        except Exception as error:  # a template is a program, and fails like one
            raise TemplateError(f"{type(error).__name__}: {error}") from error
        return rendered

    def _takes_parts(self) -> bool:
        """Return whether the template renders turns that are lists of typed parts."""
        turn = {"role": "user", "content": [{"type": "text", "text": "probe"}]}
        try:
            rendered = self._render([turn])
        except TemplateError:
            return False
        return "probe" in rendered and "'text'" not in rendered

    def _common_start(self) -> _Start | None:
        """Return what the text of every example begins with, with its tokens.

        It ends before a token that the tokenizer finds in a text before it does anything else, so
        that the texts on both sides of it are tokenised apart from each other.
        """
        steps = (Step("first"), Step("second"))
        probes = [StepExample("probe", question, (), steps) for question in ("q", "Which?")]
        texts = [self.text(probe) for probe in probes]
        same = takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False))
        common = "".join(character for character, _ in same)
        cuts = [
            (common.rfind(token.content), token.content)
            for token in self.tokenizer.added_tokens_decoder.values()
            if token.special and not (token.normalized or token.lstrip)
        ]
        cut, token = max(cuts, default=(0, ""))
        if cut <= 0:
            return None
        ids = self._ids(common[:cut])
        if any(self._ids(text) != ids + self._ids(text[cut:]) for text in texts):
            return None
        return _Start(common[:cut], token, ids)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _check_template(self) -> tuple[str, ...]:
        """Check that later turns do not change earlier ones; return the template's own tokens.

        The text before a slot is then that of a chat just before the model answers.
        """
        probe = StepExample("probe", "q", (), (Step("first"), Step("second"), Step("third")))
        turns = self._turns(probe, [SLOT] * 3)
        try:
            whole = self._render(turns)
            pieces = whole.split(SLOT)
            before = [
                self._render(turns[:-missing], generate=True)
                for missing in (5, 3, 1)  # Up to the first, second and third user turn.
            ]
        except TemplateError as error:
            raise ValueError(
                f"expected a chat template for system, user and assistant turns; it refused: "
                f"{error}; try system_prompt=None, or another tokenizer.chat_template"
            ) from error
        for steps, prompt in enumerate(before, start=1):
            if len(pieces) != 4 or SLOT.join(pieces[:steps]) != prompt:
                raise ValueError(
                    "expected a chat template that leaves earlier turns as they are when turns "
                    f"are added and ends with the assistant's header; before step {steps} it "
                    f"renders {prompt[-80:]!r} when it generates, but "
                    f"{SLOT.join(pieces[:steps])[-80:]!r} in the whole conversation; set "
                    "tokenizer.chat_template to one without such rules"
                )
        added = self.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special and token.content in whole}
        if self.image_tokens is not None:
            special |= self.image_tokens.reserved
        return (SLOT, *sorted(special))


def _texts(example: StepExample) -> list[tuple[str, str]]:
    steps = [(f"steps[{number}].text", step.text) for number, step in enumerate(example.steps)]
    return [("question", example.question), *steps]
