"""The examples and batches of each step, as functions of the seed and the step alone.

Nothing here has a state, so a run resumes in the middle of an epoch from its step number. A draw
gives the rows of every numbered micro-batch, and a batch function collates them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prm.batches.workers import ordered_map
from prm.data.store.outline import Facts
from prm.inputs.collate import Batch
from prm.schema import StepExample
from recipes.models.loading import Examples
from recipes.options.train import LowerOptions, TrainOptions
from recipes.ranks import share

Batches = TypeVar("Batches")
Draw: TypeAlias = Callable[[int], list[list[int]]]
"""Map the number of a micro-batch to its rows by question; a single example is a question, too."""

LOWER, UPPER, COLD_START = 1, 2, 3
"""Random streams of the run's seed; see ``stream_seed``."""

_OF_STEPS = ("reference_probs",)  # columns [examples, steps]
_EPOCH_STRIDE = 1_000_003  # keeps the seeds of (seed, epoch) pairs apart


def stream_seed(options: LowerOptions, stream: int) -> int:
    """Return the seed of a random stream of the run: ``LOWER``, ``UPPER`` or ``COLD_START``."""
    return options.seed * 10 + stream


def epoch_order(rows: int, seed: int) -> Callable[[int, int], list[int]]:
    """Return a function that gives any part of an endless sequence of shuffled epochs.

    The sequence is the concatenation of one permutation per epoch: every row is visited once per
    epoch, and a batch may cross into the next epoch. It is a pure function of the seed.

    Args:
        rows: The number of rows.
        seed: The seed of the permutations.

    Returns:
        A function of ``(start, count)`` to the rows at positions start to start + count - 1.

    Raises:
        ValueError: The number ``rows`` is not positive.
    """
    if rows < 1:
        raise ValueError(f"cannot order {rows} rows; expected at least 1")

    @lru_cache(maxsize=2)
    def permutation(epoch: int) -> NDArray[np.int64]:
        generator = torch.Generator().manual_seed(seed * _EPOCH_STRIDE + epoch)
        return torch.randperm(rows, generator=generator).numpy()

    def stretch(start: int, count: int) -> list[int]:
        return [int(permutation(at // rows)[at % rows]) for at in range(start, start + count)]

    return stretch


def lower_draw(options: LowerOptions, rows: Sequence[int]) -> Draw:
    """Return the lower level's micro-batches: shuffled epochs over ``rows``, cut into batches."""
    return _draw_examples(rows, options.lower.batch_size, stream_seed(options, LOWER))


def lower_meta_draw(options: TrainOptions, meta: Examples) -> Draw:
    """Return the micro-batches of a lower level that trains on the meta set."""
    if options.loss_target == "pairs":
        return _draw_questions(meta, options.lower.batch_size, stream_seed(options, LOWER))
    return lower_draw(options, range(len(meta)))


def upper_draw(options: TrainOptions, meta: Examples) -> Draw:
    """Return the meta batches, which hold whole mixed questions with the loss target "pairs"."""
    size, seed = min(options.upper.meta_batch_size, len(meta)), stream_seed(options, UPPER)
    if options.loss_target == "pairs":
        return _draw_questions(meta, size, seed)
    return _draw_examples(range(len(meta)), size, seed)


def train_batch(
    draw: Draw, data: Examples, columns: Mapping[str, Tensor] = MappingProxyType({})
) -> Callable[[int], Batch]:
    """Return a function that gives the numbered micro-batches of step-labelled examples.

    Args:
        draw: The rows of every numbered micro-batch.
        data: The examples.
        columns: Values of every example, [examples, ...], that batches also hold; those of every
            step, [examples, steps], are cut to the steps of the batch.
    """

    def batch(number: int) -> Batch:
        rows = _rows(draw(number))
        examples = data.batch(rows)
        steps = examples["step_mask"].shape[1]
        for name, values in columns.items():
            column = values[rows]
            examples[name] = column[:, :steps] if name in _OF_STEPS else column
        return examples

    return batch


def meta_batch(
    draw: Draw, meta: Examples, rank: int = 0, ranks: int = 1, tree_width: int | None = None
) -> Callable[[int], Batch]:
    """Return the numbered batches of solutions; ``group`` [batch] is equal in a question.

    Args:
        draw: The rows of every numbered batch.
        meta: The solutions.
        rank: Whose part of each batch.
        ranks: Into how many parts of whole questions a batch is divided. A part without any is
            an empty dict.
        tree_width: What ``PRM.tree_width`` says of a model that computes the solutions of a
            question as trees; None means as sequences.
    """

    def batch(micro_batch: int) -> Batch:
        questions = draw(micro_batch)
        part = share(len(questions), rank, ranks)
        questions = questions[part.start : part.stop]
        if not questions:
            return {}
        owners = [torch.full((len(rows),), number) for number, rows in enumerate(questions)]
        rows = _rows(questions)
        group = torch.cat(owners)
        if tree_width is None:
            return meta.batch(rows) | {"group": group}
        return meta.question_batch(rows, tree_width) | {"group": group}

    return batch


def per_step(
    batch: Callable[[int], Batch], accumulation: int, rank: int = 0, ranks: int = 1
) -> Callable[[int], list[Batch]]:
    """Return a rank's micro-batches of a step: its share of ``accumulation`` ones, in order."""
    parts = share(accumulation, rank, ranks)
    return lambda step: [batch(step * accumulation + part) for part in parts]


def ahead(
    batches: Callable[[int], Batches], steps: int, workers: int, every: int = 1
) -> Callable[[int], Batches]:
    """Return the same ``batches``, prepared in advance by worker processes.

    Args:
        batches: The batches of a step, as a function of its number.
        steps: The number of steps of the whole run.
        workers: The number of processes. With 0, every batch is prepared when it is requested.
        every: The number of steps from one request to the next. At a request for any other step
            the processes start again from that step.
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
    """Count how often the first ``micro_batches`` hold each example, [examples] int64."""
    drawn = np.fromiter(
        (row for number in range(micro_batches) for row in _rows(draw(number))), dtype=np.int64
    )
    return torch.bincount(torch.from_numpy(drawn), minlength=examples)


def _draw_examples(rows: Sequence[int], size: int, seed: int) -> Draw:
    order = epoch_order(len(rows), seed)
    return lambda number: [[rows[row]] for row in order(number * size, size)]


def mixed_questions(solutions: Iterable[Facts | StepExample]) -> tuple[list[list[int]], int]:
    """Return the rows of every question with right and wrong solutions, and the number of all."""
    by_name: dict[str, list[int]] = {}
    outcomes: dict[str, set[bool | None]] = {}
    for row, solution in enumerate(solutions):
        by_name.setdefault(str(solution.group), []).append(row)
        outcomes.setdefault(str(solution.group), set()).add(solution.correct)
    return [rows for name, rows in by_name.items() if len(outcomes[name]) == 2], len(by_name)


def _draw_questions(data: Examples, size: int, seed: int) -> Draw:
    """Draw whole mixed questions of about ``size`` solutions together: at least one, at most all.

    A question whose solutions are all right, or all wrong, has no pair to compare.
    """
    questions, _ = mixed_questions(data.facts)
    order = epoch_order(len(questions), seed)
    solutions = sum(map(len, questions))
    count = max(1, min(size * len(questions) // solutions, len(questions)))
    return lambda number: [questions[row] for row in order(number * count, count)]


def _rows(questions: Sequence[Sequence[int]]) -> list[int]:
    return [row for question in questions for row in question]
