"""Which examples each step sees, and their batches: functions of the seed and the step alone.

Nothing here has a state, so a run continues in the middle of an epoch from its step number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from prm.inputs.collate import Batch
from prm.inputs.workers import ordered_map
from recipes.loading import Examples
from recipes.options.train import ColdStartOptions, LowerOptions, TrainOptions
from recipes.train.order import epoch_order

Made = TypeVar("Made")
Draw: TypeAlias = Callable[[int], list[list[int]]]
"""Number of a micro-batch -> its rows, by question; an example by itself is a question of one."""

_LOWER, _UPPER, _COLD_START = 1, 2, 3  # which random stream of the run's seed


def cold_start_rows(options: ColdStartOptions, rows: int) -> list[int]:
    """The rows that a cold start trains on: ``draw`` of ``rows`` at random, 0 or too many: all."""
    count = rows if options.draw == 0 else min(options.draw, rows)
    return epoch_order(rows, _seed(options, _COLD_START))(0, count)


def lower_draw(options: LowerOptions, rows: Sequence[int]) -> Draw:
    """Micro-batches of the lower level: shuffled epochs over ``rows``, cut into batches."""
    return _draw_examples(rows, options.batch_size, _seed(options, _LOWER))


def lower_meta_draw(options: TrainOptions, meta: Examples) -> Draw:
    """Micro-batches of the lower level where that trains on the meta set."""
    if options.loss_target == "pairs":
        return _draw_questions(meta, options.batch_size, _seed(options, _LOWER))
    return lower_draw(options, range(len(meta)))


def upper_draw(options: TrainOptions, meta: Examples) -> Draw:
    """Meta batches; with loss target "pairs" made of whole questions."""
    size, seed = min(options.meta_batch_size, len(meta)), _seed(options, _UPPER)
    if options.loss_target == "pairs":
        return _draw_questions(meta, size, seed)
    return _draw_examples(range(len(meta)), size, seed)


def train_batch(
    draw: Draw, data: Examples, columns: Mapping[str, Tensor] = MappingProxyType({})
) -> Callable[[int], Batch]:
    """Numbered micro-batches of step-labelled examples.

    Args:
        draw: which rows.
        data: the examples.
        columns: values [examples] or [examples, steps] of every example, which batches also hold.
    """

    def batch(number: int) -> Batch:
        rows = _rows(draw(number))
        made = data.batch(rows)
        steps = made["step_mask"].shape[1]
        for name, values in columns.items():
            picked = values[rows]
            made[name] = picked[:, :steps] if picked.dim() == 2 else picked
        return made

    return batch


def meta_batch(draw: Draw, meta: Examples) -> Callable[[int], Batch]:
    """Numbered batches of solutions; ``group`` [batch] is equal within a question."""

    def batch(number: int) -> Batch:
        questions = draw(number)
        owners = [torch.full((len(rows),), place) for place, rows in enumerate(questions)]
        return meta.batch(_rows(questions)) | {"group": torch.cat(owners)}

    return batch


def per_step(batch: Callable[[int], Batch], accumulation: int) -> Callable[[int], list[Batch]]:
    """The micro-batches of a step: ``accumulation`` of the numbered ones, in order."""
    return lambda step: [batch(step * accumulation + place) for place in range(accumulation)]


def ahead(
    batches: Callable[[int], Made], steps: int, workers: int, every: int = 1
) -> Callable[[int], Made]:
    """``batches``, made by worker processes before they are asked for; the same batches.

    Args:
        batches: what a step needs, a function of its number.
        steps: of the whole run.
        workers: processes; 0: every batch is made when it is asked for.
        every: steps from one that is asked for to the next. Where another comes the processes
            start again from there.
    """
    if not workers:
        return batches
    made: Iterator[Made] = iter(())
    due = -1

    def batch(step: int) -> Made:
        nonlocal made, due
        if step != due:
            made = ordered_map(batches, range(step, steps, every), workers)
        due = step + every
        return next(made)

    return batch


def count_visits(draw: Draw, micro_batches: int, examples: int) -> Tensor:
    """How often the first ``micro_batches`` draws hold each example, [examples] int64."""
    drawn = [row for number in range(micro_batches) for row in _rows(draw(number))]
    return torch.bincount(torch.tensor(drawn, dtype=torch.int64), minlength=examples)


def _draw_examples(rows: Sequence[int], size: int, seed: int) -> Draw:
    order = epoch_order(len(rows), seed)
    return lambda number: [[rows[place]] for place in order(number * size, size)]


def _draw_questions(data: Examples, size: int, seed: int) -> Draw:
    """As many whole questions as make up about ``size`` solutions, at least one, at most all."""
    by_name: dict[str, list[int]] = {}
    for row, example in enumerate(data.examples):
        by_name.setdefault(str(example.group), []).append(row)
    questions = list(by_name.values())
    order = epoch_order(len(questions), seed)
    count = max(1, min(size * len(questions) // len(data), len(questions)))
    return lambda number: [questions[place] for place in order(number * count, count)]


def _rows(questions: Sequence[Sequence[int]]) -> list[int]:
    return [row for question in questions for row in question]


def _seed(options: LowerOptions, stream: int) -> int:
    return options.seed * 10 + stream
