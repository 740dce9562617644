"""Pretrain the tiny InternVL base model that ships as package data.

A thousand noisy solutions do not suffice to train a process reward model from random weights. It
starts from a base model that reads pictures and judges simple statements. The base model answers
``true`` or ``false`` and has never seen the labels "+" and "-", so as a process reward model it is
at chance level before it is trained. Pretraining has five stages, all on the ``base`` split of the
scans, which no other data set uses:

1. The vision tower learns, with a linear head per visual token, which digit is in which cell.
2. The language model learns from dense statements, each followed at once by its verdict
   (``A1= 5 false 3 plus 4 = 7 true``).
3. The language model learns the same verdicts in chat turns, in the layout in which steps are
   scored later.
4. Batches of both kinds alternate.
5. Documents follow one of two conventions, row numbers from the top or from the bottom. A third of
   them say so ("from the top"), a third the other ("from the bottom"), and the others do not tell
   which of the two they follow, each as often. So the model represents both, and prefers neither
   where nothing is said. Until then all documents count from the top. The words that name the
   conventions are then dropped from the vocabulary, so that no prompt can choose one of them: only
   training can.

A verdict states whether a *single statement* is true. That a step counts as wrong after an earlier
wrong one is left to fine-tuning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from recipes.embedded.questions import combine_step, draw_question, read_step
from recipes.embedded.sheets import CELLS, PICTURES, Scans, draw_sheet, load_scans, renamed
from recipes.embedded.student import CONFUSABLE, Difficulty, attempt
from recipes.embedded.vocabulary import (
    ROW_ENDS,
    SYSTEM_PROMPT,
    base_config,
    build_image_processor,
    build_tokenizer,
)

_PICTURE_SHARES = (0.7, 0.15, 0.15)
_DENSE_STATEMENTS = 10
_SAYING = 0.7  # share of the documents of the last stage that say which convention they follow
_PICTURE = "<img>" + "<IMG_CONTEXT>" * len(CELLS) + "</img>"
VERDICTS = ("true", "false")
STAGES = {
    "tower": (3000, 64, 2e-3),
    "statements": (3000, 32, 1.5e-3),
    "chat": (1500, 32, 1e-3),
    "both": (3000, 32, 1.5e-3),
    "conventions": (4000, 32, 1.5e-3),
}
"""The number of steps, batch size and peak learning rate of each stage."""
_LAST = "conventions"

Batch = dict[str, Tensor]


def pretrain_base(
    directory: Path, *, seed: int = 0, scale: float = 1.0, start: Path | None = None
) -> dict[str, float]:
    """Run the stages and save model, tokenizer and image processor into ``directory``.

    Args:
        directory: The folder to write, which plain transformers can load.
        seed: The seed of initial weights, pictures and statements.
        scale: The factor on every stage's number of steps, which is small in tests.
        start: The folder of a model after the first four stages, to run the last one alone.

    Returns:
        The accuracies on scans of the ``dev`` split: digits, statements and chat verdicts.
    """
    from transformers import InternVLForConditionalGeneration

    torch.manual_seed(seed)
    scans = load_scans()
    tokenizer = build_tokenizer(ROW_ENDS)
    if start is None:
        model = InternVLForConditionalGeneration(base_config())
    else:
        model = InternVLForConditionalGeneration.from_pretrained(start)
    makers: dict[str, Callable[[str, np.random.Generator, int], Batch]] = {
        "tower": lambda part, rng, size: _tower_batch(scans[part], rng, size),
        "statements": lambda part, rng, size: _dense_batch(tokenizer, scans[part], rng, size),
        "chat": lambda part, rng, size: _chat_batch(tokenizer, scans[part], rng, size),
        "both": lambda part, rng, size: makers["chat" if rng.random() < 0.5 else "statements"](
            part, rng, size
        ),
        "conventions": lambda part, rng, size: (
            _chat_batch if rng.random() < 0.5 else _dense_batch
        )(tokenizer, scans[part], rng, size, both=True),
    }
    reader = nn.Linear(model.config.text_config.hidden_size, 10)

    def loss_of(stage: str, batch: Batch) -> tuple[Tensor, Tensor]:
        if stage == "tower":
            return _tower_loss(model, reader, batch)
        return _verdict_loss(model, batch)

    accuracies = {}
    for stage, (steps, size, lr) in STAGES.items():
        if start is not None and stage != _LAST:
            continue
        if stage == _LAST:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        vision = [model.model.vision_tower, model.model.multi_modal_projector]
        for parameter in model.parameters():
            parameter.requires_grad_(stage != "tower")
        for module in vision:
            module.requires_grad_(stage == "tower")
        parameters = [p for p in [*model.parameters(), *reader.parameters()] if p.requires_grad]
        rng = np.random.default_rng([seed, list(STAGES).index(stage)])
        _fit(
            stage,
            parameters,
            partial(loss_of, stage),
            partial(makers[stage], "base", rng, size),
            max(1, round(steps * scale)),
            lr,
        )
        with torch.no_grad():
            held_out = makers[stage]("dev", np.random.default_rng(seed + 1), 512)
            accuracies[stage] = float(loss_of(stage, held_out)[1])
        tqdm.write(f"{stage}: accuracy on held-out scans {accuracies[stage]:.4f}")
    model.requires_grad_(True)
    tokenizer = build_tokenizer()  # without the words that name a convention
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    build_image_processor().save_pretrained(directory)
    return accuracies


def _fit(
    stage: str,
    parameters: list[nn.Parameter],
    loss_of: Callable[[Batch], tuple[Tensor, Tensor]],
    next_batch: Callable[[], Batch],
    steps: int,
    lr: float,
) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    smooth = 0.0
    with tqdm(range(steps), desc=stage, disable=None) as bar:
        for step in bar:
            loss, accuracy = loss_of(next_batch())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if step % 20 == 0:
                smooth = 0.8 * smooth + 0.2 * float(accuracy) if step else float(accuracy)
                bar.set_postfix(loss=f"{float(loss.detach()):.3f}", accuracy=f"{smooth:.3f}")


def _sheets(scans: Scans, rng: np.random.Generator, size: int) -> tuple[Tensor, np.ndarray]:
    """Return pixel values [size, 3, 32, 32] as the image processor's, and digits [size, 4]."""
    values = rng.integers(0, 10, (size, len(CELLS)))
    pictures = rng.choice(PICTURES, size, p=_PICTURE_SHARES)
    sheets = np.stack(
        [
            draw_sheet(dict(zip(CELLS, map(int, row), strict=True)), scans, rng, str(picture))
            for row, picture in zip(values, pictures, strict=True)
        ]
    )
    pixels = torch.from_numpy(sheets).float()[:, None].expand(-1, 3, -1, -1)
    return (pixels / 255 - 0.5) / 0.5, values


def _tower_batch(scans: Scans, rng: np.random.Generator, size: int) -> Batch:
    pixels, values = _sheets(scans, rng, size)
    return {"pixel_values": pixels, "values": torch.from_numpy(values)}


def _tower_loss(model: Any, reader: nn.Linear, batch: Batch) -> tuple[Tensor, Tensor]:
    tokens = model.model.get_image_features(batch["pixel_values"]).pooler_output
    logits = reader(tokens.reshape(len(batch["values"]), len(CELLS), -1))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["values"].flatten())
    return loss, (logits.argmax(-1) == batch["values"]).float().mean()


class _Convention(NamedTuple):
    """The convention that a document follows: the values by its names, and what it says of it."""

    values: dict[str, int]
    said: str


def _convention(row: np.ndarray, rng: np.random.Generator, *, both: bool) -> _Convention:
    """Return the convention of a document on a sheet: of ``both``, or the first one alone."""
    values = dict(zip(CELLS, map(int, row), strict=True))
    if not both:
        return _Convention(values, "")
    end, says = int(rng.integers(2)), rng.random() < _SAYING
    return _Convention(renamed(values) if end else values, ROW_ENDS[end] if says else "")


def _wrong_reading(cell: str, values: dict[str, int], rng: np.random.Generator) -> int:
    kind = rng.random()
    if kind < 0.5:
        return CONFUSABLE[values[cell]][int(rng.integers(2))]
    if kind < 0.75:
        return values[CELLS[int(rng.integers(4))]]
    return int(rng.integers(10))


def _wrong_result(operation: str, left: int, right: int, value: int, rng: Any) -> int:
    if operation == "max" and rng.random() < 0.7:
        return min(left, right)
    return max(0, value + int(rng.choice([-10, -3, -2, -1, 1, 2, 3, 10])))


def _statement(
    values: dict[str, int], rng: np.random.Generator, *, both: bool = False
) -> tuple[str, bool]:
    """Return a random statement about a sheet or about numbers, and whether it is true.

    With ``both``, half of the readings count rows from the end that ``values`` do not.
    """
    if rng.random() < 0.55:
        cell = CELLS[int(rng.integers(4))]
        seen = renamed(values) if both and rng.random() < 0.5 else values
        read = seen[cell] if rng.random() < 0.5 else _wrong_reading(cell, seen, rng)
        step = read_step(cell, read, values)
    else:
        operation = str(rng.choice(["plus", "gap", "max"]))
        left, right = int(rng.integers(0, 19 if rng.random() < 0.5 else 10)), int(rng.integers(10))
        truth = {"plus": left + right, "gap": abs(left - right), "max": max(left, right)}[operation]
        stated = truth if rng.random() < 0.5 else _wrong_result(operation, left, right, truth, rng)
        step = combine_step(operation, left, right, stated)
    return step.text, step.true


def _dense_batch(
    tokenizer: Any, scans: Scans, rng: np.random.Generator, size: int, *, both: bool = False
) -> Batch:
    pixels, values = _sheets(scans, rng, size)
    texts = []
    for row in values:
        document = _convention(row, rng, both=both)
        statements = [_statement(document.values, rng, both=both) for _ in range(_DENSE_STATEMENTS)]
        sentences = [f"{text} {VERDICTS[0] if true else VERDICTS[1]}" for text, true in statements]
        texts.append(" ".join([_PICTURE, document.said, *sentences]))
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    ids = batch["input_ids"]
    right, wrong = (tokenizer.convert_tokens_to_ids(word) for word in VERDICTS)
    targets = torch.full_like(ids, -100)
    targets[:, :-1] = torch.where((ids == right) | (ids == wrong), ids, -100)[:, 1:]
    # The number in a true statement is a target, too, as in ordinary language modelling: it trains
    # reading much faster than verdicts alone.
    numbers = torch.full_like(ids, -100)
    numbers[:, :-2] = torch.where(ids[:, 2:] == right, ids[:, 1:-1], -100)
    return {**batch, "pixel_values": pixels, "targets": targets, "numbers": numbers}


def _chat_batch(
    tokenizer: Any, scans: Scans, rng: np.random.Generator, size: int, *, both: bool = False
) -> Batch:
    """Return solutions with many mistakes and step verdicts in the layout of ``prm.inputs``.

    With ``both``, half of the solvers follow the convention that the document does not follow.
    """
    pixels, values = _sheets(scans, rng, size)
    right, wrong = (tokenizer.convert_tokens_to_ids(word) for word in VERDICTS)
    header = tokenizer.convert_tokens_to_ids("assistant")
    texts, verdicts = [], []
    for row in values:
        document = _convention(row, rng, both=both)
        question = draw_question(rng, values=document.values)
        misread = dict.fromkeys(CELLS, 0.4)
        taken_for = {cell: _wrong_reading(cell, document.values, rng) for cell in CELLS}
        difficulty = Difficulty(misread, taken_for, 0.4, 0.1, other_end=0.5 if both else 0.0)
        steps = attempt(question, difficulty, rng).steps
        verdicts.append([right if step.true else wrong for step in steps])
        turns = [{"role": "system", "content": f"{SYSTEM_PROMPT} {document.said}".strip()}]
        for index, step in enumerate(steps):
            text = (
                f"{_PICTURE}\n### Question:\n{question.text}\n\n### Solution Process:\n{step.text}"
                if index == 0
                else step.text
            )
            turns += [
                {"role": "user", "content": text},
                {"role": "assistant", "content": VERDICTS[0]},
            ]
        texts.append(tokenizer.apply_chat_template(turns, tokenize=False))
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    ids = batch["input_ids"]
    targets = torch.full_like(ids, -100)
    targets[ids == header] = torch.tensor(verdicts).flatten()
    numbers = torch.full_like(ids, -100)
    # A chat turn ends in "<number> <|im_end|> <|im_start|> assistant". The token before the number
    # of a true step predicts it.
    numbers[:, :-4] = torch.where(targets[:, 4:] == right, ids[:, 1:-3], -100)
    return {**batch, "pixel_values": pixels, "targets": targets, "numbers": numbers}


def _verdict_loss(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    hidden = model.model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        pixel_values=batch["pixel_values"],
    ).last_hidden_state
    loss = torch.zeros(())
    for targets in (batch["numbers"], batch["targets"]):
        kept = targets != -100
        logits = model.lm_head(hidden[kept])
        loss = loss + nn.functional.cross_entropy(logits, targets[kept])
    return loss, (logits.argmax(-1) == targets[kept]).float().mean()
