"""The step scores of the examples of highest and lowest weight, for those who look at them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prm.files import write_lines
from prm.models.model import PRM
from recipes.evaluation.candidates import step_scores_of
from recipes.models.loading import Examples
from recipes.options.train import TrainOptions
from recipes.run.files import EXTREMES

_EITHER_END = 6


def write_extremes(
    directory: Path,
    prm: PRM,
    params: Mapping[str, Tensor],
    data: Examples,
    weights: Tensor,
    initial: Tensor | None,
    options: TrainOptions,
) -> None:
    """Write ``extreme_weights.jsonl``: id, weight and step scores of the first and last six.

    At most twelve forward passes. Nothing is written if all weights are equal.

    Args:
        directory: The run directory.
        prm: The model.
        params: Its trained parameters.
        data: The examples.
        weights: Their weights, [examples].
        initial: Their step scores under the initial model, [examples, steps], or None.
        options: The options of the run.
    """
    if weights.min() == weights.max():
        return
    order = torch.argsort(weights, descending=True, stable=True).tolist()
    top = min(_EITHER_END, len(order) // 2)
    rows = [*order[:top], *order[::-1][:top]]
    chosen = data.only(rows)
    scores, mask = step_scores_of(prm, params, chosen, options)

    def lines() -> Iterator[str]:
        for place, (row, example) in enumerate(zip(rows, chosen.facts, strict=True)):
            steps = int(mask[place].sum())
            entry: dict[str, Any] = {"id": example.id, "weight": weights[row].item()}
            entry["step_scores"] = scores[place, :steps].tolist()
            if initial is not None:
                entry["initial_scores"] = initial[row, :steps].tolist()
            yield json.dumps(entry, ensure_ascii=False) + "\n"

    write_lines(directory / EXTREMES, lines())
