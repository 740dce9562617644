"""The learned labels of a run: a file of them, and how many were turned over."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prm.digests import write_digest
from prm.files import write_lines
from recipes.models.loading import Examples
from recipes.train.reports.weights import example_batch
from weighting import StepLabels

_EVEN = 0.5


def learned_labels(
    weighting: StepLabels, params: Mapping[str, Tensor], data: Examples
) -> tuple[Tensor, Tensor]:
    """Return the given and the learned labels of a file, [examples, steps] each, NaN for none.

    Args:
        weighting: The table of labels.
        params: Its parameters.
        data: The examples of the table, with their rows.
    """
    batch = example_batch(weighting, data.examples, data.index(), {})
    on_host = {name: leaf.detach().cpu() for name, leaf in params.items()}
    return batch["labels"], weighting.labels(on_host, batch)


def write_labels(path: Path, data: Examples, given: Tensor, learned: Tensor) -> None:
    """Write ``labels.jsonl`` with its digest: of every example its id, given and learned labels.

    There is an entry for each step, null for one without a label.
    """

    def lines() -> Iterator[str]:
        for row, example in enumerate(data.facts):
            steps = len(example.labels)
            entry = {"id": example.id, "given": _listed(given[row, :steps])}
            entry["learned"] = _listed(learned[row, :steps])
            yield json.dumps(entry, ensure_ascii=False) + "\n"

    write_lines(path, lines())
    write_digest(path)


def _listed(labels: Tensor) -> list[float | None]:
    return [None if label != label else label for label in labels.tolist()]


def label_report(data: Examples, given: Tensor, learned: Tensor) -> dict[str, Any]:
    """Return the number of labels, and of those turned over, in all and by source.

    A label is turned over if it is on the other side of 1/2 than the given one.
    """
    turned = ((learned - _EVEN) * (given - _EVEN) < 0).sum(1)
    known = (~given.isnan()).sum(1)
    report: dict[str, Any] = {"steps": int(known.sum()), "turned_over": int(turned.sum())}
    sources = [example.extra.get("source") for example in data.examples]
    names = [name for name in dict.fromkeys(sources) if name is not None]
    if names:
        report["turned_over_by_source"] = {
            str(name): int(turned[torch.tensor([one == name for one in sources])].sum())
            for name in names
        }
    return {"labels": report}


def label_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines on a ``label_report`` for the terminal."""
    yield f"{report['turned_over']:,} of {report['steps']:,} step labels were turned over"
    for source, count in report.get("turned_over_by_source", {}).items():
        yield f"  {source:<12}{count:,}"
