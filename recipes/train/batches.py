"""Which examples each step sees, and their batches: functions of the seed and the step alone.

Nothing here has a state, so a run continues in the middle of an epoch from its step number.
A draw numbers micro-batches and says which rows each holds; a batch function collates them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from prm.inputs.collate import Batch
from prm.inputs.workers import ordered_map
from recipes.loading import Examples
from recipes.options.train import LowerOptions, TrainOptions

Batches = TypeVar("Batches")
Draw: TypeAlias = Callable[[int], list[list[int]]]
"""Number of a micro-batch -> its rows, by question; an example by itself is a question of one."""

LOWER, UPPER, COLD_START = 1, 2, 3
"""Random streams of the run's seed, see ``stream_seed``."""

_EPOCH_STRIDE = 1_000_003  # keeps the seeds of (seed, epoch) pairs apart


def stream_seed(options: LowerOptions, stream: int) -> int:
    """Seed of one of the run's random streams: ``LOWER``, ``UPPER`` or ``COLD_START``."""
    return options.seed * 10 + stream


def epoch_order(rows: int, seed: int) -> Callable[[int, int], list[int]]:
    """Rows of any stretch of an endless sequence of shuffled epochs.

    The sequence is the concatenation of one permutation per epoch: every row is visited once per
    epoch, and a batch may cross into the next epoch. It is a pure function of the seed.

    Args:
        rows: Number of rows.
        seed: Seed of the permutations.

    Returns:
        A function of ``(start, count)``: the rows at positions start to start + count - 1.

    Raises:
        ValueError: ``rows`` is not positive.
    """
    if rows < 1:
        raise ValueError(f"cannot order {rows} rows; expected at least 1")

    @lru_cache(maxsize=2)
    def permutation(epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed * _EPOCH_STRIDE + epoch)
        return torch.randperm(rows, generator=generator).tolist()

    def stretch(start: int, count: int) -> list[int]:
        return [permutation(at // rows)[at % rows] for at in range(start, start + count)]

    return stretch


def lower_draw(options: LowerOptions, rows: Sequence[int]) -> Draw:
    """Micro-batches of the lower level: shuffled epochs over ``rows``, cut into batches."""
    return _draw_examples(rows, options.lower.batch_size, stream_seed(options, LOWER))


def lower_meta_draw(options: TrainOptions, meta: Examples) -> Draw:
    """Micro-batches of the lower level where that trains on the meta set."""
    if options.loss_target == "pairs":
        return _draw_questions(meta, options.lower.batch_size, stream_seed(options, LOWER))
    return lower_draw(options, range(len(meta)))


def upper_draw(options: TrainOptions, meta: Examples) -> Draw:
    """Meta batches; with loss target "pairs" made of whole questions."""
    size, seed = min(options.upper.meta_batch_size, len(meta)), stream_seed(options, UPPER)
    if options.loss_target == "pairs":
        return _draw_questions(meta, size, seed)
    return _draw_examples(range(len(meta)), size, seed)


def train_batch(
    draw: Draw, data: Examples, columns: Mapping[str, Tensor] = MappingProxyType({})
) -> Callable[[int], Batch]:
    """Numbered micro-batches of step-labelled examples.

    Args:
        draw: Rows of a numbered micro-batch.
        data: The examples.
        columns: Values [examples] or [examples, steps] of every example, which batches also hold.
    """

    def batch(number: int) -> Batch:
        rows = _rows(draw(number))
        examples = data.batch(rows)
        steps = examples["step_mask"].shape[1]
        for name, values in columns.items():
            column = values[rows]
            examples[name] = column[:, :steps] if column.dim() == 2 else column
        return examples

    return batch


def meta_batch(draw: Draw, meta: Examples) -> Callable[[int], Batch]:
    """Numbered batches of solutions; ``group`` [batch] is equal within a question."""

    def batch(micro_batch: int) -> Batch:
        questions = draw(micro_batch)
        owners = [torch.full((len(rows),), number) for number, rows in enumerate(questions)]
        return meta.batch(_rows(questions)) | {"group": torch.cat(owners)}

    return batch


def per_step(batch: Callable[[int], Batch], accumulation: int) -> Callable[[int], list[Batch]]:
    """The micro-batches of a step: ``accumulation`` of the numbered ones, in order."""
    return lambda step: [batch(step * accumulation + part) for part in range(accumulation)]


def ahead(
    batches: Callable[[int], Batches], steps: int, workers: int, every: int = 1
) -> Callable[[int], Batches]:
    """The same ``batches``, prepared by worker processes before they are asked for.

    Args:
        batches: What a step needs, a function of its number.
        steps: Steps of the whole run.
        workers: Number of processes; 0: every batch is prepared when it is asked for.
        every: Steps from one that is asked for to the next. Where another comes the processes
            start again from there.
    """
    if not workers:
        return batches
    coming: Iterator[Batches] = iter(())
    due = -1

    def batch(step: int) -> Batches:
        nonlocal coming, due
        if step != due:
            coming = ordered_map(batches, range(step, steps, every), workers)
        due = step + every
        return next(coming)

    return batch


def count_visits(draw: Draw, micro_batches: int, examples: int) -> Tensor:
    """How often the first ``micro_batches`` draws hold each example, [examples] int64."""
    drawn = [row for number in range(micro_batches) for row in _rows(draw(number))]
    return torch.bincount(torch.tensor(drawn, dtype=torch.int64), minlength=examples)


def _draw_examples(rows: Sequence[int], size: int, seed: int) -> Draw:
    order = epoch_order(len(rows), seed)
    return lambda number: [[rows[row]] for row in order(number * size, size)]


def _draw_questions(data: Examples, size: int, seed: int) -> Draw:
    """As many whole questions as make up about ``size`` solutions, at least one, at most all."""
    by_name: dict[str, list[int]] = {}
    for row, example in enumerate(data.examples):
        by_name.setdefault(str(example.group), []).append(row)
    questions = list(by_name.values())
    order = epoch_order(len(questions), seed)
    count = max(1, min(size * len(questions) // len(data), len(questions)))
    return lambda number: [questions[row] for row in order(number * count, count)]


def _rows(questions: Sequence[Sequence[int]]) -> list[int]:
    return [row for question in questions for row in question]
