"""The weights of a run: of every example what ``weights.jsonl`` says, and where it comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from prm.data.json_rows import json_rows
from prm.digests import check_digest
from prm.schema import DataError
from recipes.options.values import OptionError
from recipes.report.run_files import DataFile
from weighting import effective_sample_size

Column = NDArray[np.float64]
COLUMNS = ("weight", "raw_weight", "visits", "initial_loss")
"""The columns of ``weights.jsonl`` beside the id."""


@dataclass(frozen=True)
class RunWeights:
    """The weights of a run at its end.

    Attributes:
        ids: The id of every example.
        columns: The columns of ``weights.jsonl`` that the run has, [examples] each; NaN for null.
        domains: The domain of every example, None for one without; empty if the data are not there.
        sources: The source of every example (the field ``source`` of its row), likewise.
        absent: Why domains and sources are not known, None if the data were read.
    """

    ids: tuple[str, ...]
    columns: Mapping[str, Column]
    domains: tuple[str | None, ...] = ()
    sources: tuple[str | None, ...] = ()
    absent: str | None = None

    @property
    def weight(self) -> Column:
        """The weights, [examples]."""
        return self.columns["weight"]

    @property
    def groups(self) -> dict[str, dict[str, NDArray[np.int64]]]:
        """The rows of every source and of every domain, where examples have more than one."""
        found = {}
        for kind, names in (("source", self.sources), ("domain", self.domains)):
            rows: dict[str, list[int]] = {}
            for row, name in enumerate(names):
                rows.setdefault("(none)" if name is None else name, []).append(row)
            if len(rows) > 1:
                found[kind] = {name: np.array(places) for name, places in rows.items()}
        return found

    def order(self) -> NDArray[np.int64]:
        """Return the rows from the highest weight to the lowest, those of equal weight in order."""
        return np.argsort(-self.weight, kind="stable")


def read_run_weights(directory: Path, data: DataFile) -> RunWeights:
    """Read the weights of a run, and domain and source of its examples if their file is there.

    Raises:
        OptionError: The run has no weights yet.
        DataError: ``weights.jsonl`` is damaged, or lacks an id or a weight.
    """
    path = directory / "weights.jsonl"
    if not path.is_file():
        raise OptionError(f"{directory}: no weights.jsonl, which `train` writes at its end")
    check_digest(path)
    ids: list[str] = []
    values: dict[str, list[float]] = {}
    for line, entry in json_rows(path):
        if isinstance(entry, DataError):
            raise entry
        ids.append(_text(entry, path, line))
        for name in COLUMNS:
            if name in entry:
                value = entry[name]
                values.setdefault(name, []).append(math.nan if value is None else float(value))
    columns = {
        name: np.array(column)
        for name, column in values.items()
        if len(column) == len(ids) and not np.isnan(column).all()
    }
    if not ids or not np.isfinite(columns.get("weight", np.array([math.nan]))).all():
        raise DataError(expected="a finite weight on every line", found="none", file=path)
    if len(set(ids)) < len(ids):
        raise DataError(expected="ids that differ", found="one twice", file=path)
    return _with_origins(RunWeights(tuple(ids), columns), data)


def _text(entry: object, path: Path, line: int) -> str:
    name = entry.get("id") if isinstance(entry, dict) else None
    if not isinstance(name, str):
        raise DataError(expected="an id", found=repr(name), file=path, line=line, field="id")
    return name


def _with_origins(weights: RunWeights, data: DataFile) -> RunWeights:
    def without(reason: str) -> RunWeights:
        return RunWeights(weights.ids, weights.columns, absent=reason)

    if not data.path.is_file():
        return without(f"the data file {data.path} is not there")
    found: dict[str, tuple[str | None, str | None]] = {}
    wanted = set(weights.ids)
    for example in data.examples():
        if example.id in wanted:
            source = example.extra.get("source")
            found[example.id] = (example.domain, None if source is None else str(source))
    if lost := len(wanted) - len(found):
        return without(f"{data.path} lacks {lost:,} of the {len(wanted):,} weighted examples")
    pairs = [found[name] for name in weights.ids]
    domains, sources = zip(*pairs, strict=True)
    return RunWeights(weights.ids, weights.columns, domains, sources)


def effective_share(weights: Column) -> float:
    """Return (Σ w)² / (n Σ w²), Kish's effective sample size as a share; 0 if all weights are 0."""
    return effective_sample_size(torch.from_numpy(weights)) / len(weights)


def histogram(values: Column, bins: int) -> tuple[NDArray[np.int64], Column]:
    """Return counts [bins] and edges [bins + 1], equally wide from the least to the largest value.

    Where all values are equal there is one bin around them.
    """
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high, bins = low - 0.5, high + 0.5, 1
    return np.histogram(values, bins=bins, range=(low, high))
