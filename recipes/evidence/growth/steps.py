"""Time and memory of a step against batch, tokens and tiles.

The architecture is InternVL's with random weights and 2 million parameters. A step is one of
``train`` as by default: order upper-first by ``Auto``, an average of v, a lower and an upper batch
of the same size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bilevel import AdamW, BilevelSolver, OneStep
from prm.inputs.collate import Batch
from recipes.evidence.bench.measure import with_peak
from recipes.evidence.bench.race.model import Race, Shape, image_token_id, make_race
from recipes.evidence.growth.fit import milliseconds

SHAPE = Shape("4 + 4 layers", 4, 112, 608, 128, vocabulary=1000, image=112, text=112)
"""16 tokens a tile of 64 patches, 112 of text."""

Case = tuple[int, int, int]
"""Examples of a batch, tokens of text, tiles of an example."""

CASES: dict[str, Callable[[int], Case]] = {
    "batch": lambda size: (size, SHAPE.text, 1),
    "tokens": lambda size: (2, size - SHAPE.image_tokens, 1),
    "tiles": lambda size: (2, SHAPE.text, size),
}
SIZES = {
    "batch": (1, 2, 4, 8, 16, 32),
    "tokens": (128, 256, 512, 1024, 2048),
    "tiles": (1, 2, 4, 8, 16),
}


def batch_of(race: Race, case: Case, seed: int) -> Batch:
    """Return a batch with the fields of both levels."""
    size, text, tiles = case
    shape = replace(race.shape, text=text + (tiles - 1) * race.shape.image_tokens)
    found = dict(replace(race, shape=shape).batch(size, seed))
    found["input_ids"][:, 20 : 20 + tiles * shape.image_tokens] = image_token_id(shape)
    draw = torch.Generator().manual_seed(seed)
    found["pixel_values"] = torch.randn(size * tiles, 3, shape.image, shape.image, generator=draw)
    found["num_patches"] = torch.full((size,), tiles, dtype=torch.int64)
    return found


def measured(axis: str, sizes: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Return processor milliseconds and peak bytes of a step for each size.

    All sizes take turns. ``peak_bytes`` is what a step allocates beyond its state.
    """
    race = make_race(SHAPE, torch.float32)
    problem = race.objective.problem()
    solver: Any = BilevelSolver(
        problem, AdamW(1e-4), AdamW(1e-2), OneStep(order="upper-first", direction_decay=0.9)
    )
    state = solver.init(race.params, race.weights)
    runs: dict[int, Callable[[], Any]] = {}
    for size in sizes:
        lower, upper = (batch_of(race, CASES[axis](size), seed) for seed in (1, 2))
        runs[size] = partial(solver.advance, state, [[lower]], upper)
        runs[size]()  # rules per example are verified for new shapes
    peaks = {size: with_peak(run)[1] for size, run in runs.items()}
    times = milliseconds({str(size): run for size, run in runs.items()}, rounds)
    return [{"size": size, "cpu_ms": times[str(size)], "peak_bytes": peaks[size]} for size in sizes]
