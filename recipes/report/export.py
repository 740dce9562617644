"""The weights of a run as a table, CSV or Parquet, with a row per example."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.options.values import OptionError
from recipes.report.outputs import new_output, pyarrow_for
from recipes.report.run_weights import RunWeights


def export_table(
    weights: RunWeights, name: str, *, overwrite: bool, inputs: Sequence[Path] = ()
) -> None:
    """Write id, the columns of ``weights.jsonl``, and domain and source where they are known.

    Args:
        weights: The weights.
        name: The file, whose name ends with ``.csv`` or ``.parquet``.
        overwrite: Whether an existing file is replaced.
        inputs: Files that are never replaced, the data file of the run, say.

    Raises:
        OptionError: The name ends otherwise, or the file exists, or is one of ``inputs``.
        ModuleNotFoundError: The extra ``datasets``, which writes Parquet, is not installed.
        OSError: The file cannot be written.
    """
    suffix = Path(name).suffix.lower()
    if suffix not in (".csv", ".parquet"):
        raise OptionError(f"--export {name}: expected a name that ends with .csv or .parquet")
    columns = _columns(weights)
    arrow = pyarrow_for("Parquet") if suffix == ".parquet" else None
    with new_output("--export", name, overwrite=overwrite, inputs=inputs) as file:
        if arrow is not None:
            from pyarrow import parquet

            parquet.write_table(arrow.table(columns), file)
            return
        with file.open("w", encoding="utf-8", newline="") as text:
            writer = csv.writer(text)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))


def _columns(weights: RunWeights) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {"id": list(weights.ids)}
    for name, values in weights.columns.items():
        columns[name] = [None if math.isnan(value) else value for value in values.tolist()]
    for name, origins in (("domain", weights.domains), ("source", weights.sources)):
        if any(origin is not None for origin in origins):
            columns[name] = list(origins)
    return columns
