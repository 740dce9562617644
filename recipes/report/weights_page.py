"""``bilevel-prm weights``: the weights of a run in the terminal, or in a file for others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from recipes.options.rules import check_together
from recipes.report.annotate import annotate
from recipes.report.export import export_table
from recipes.report.options import WeightsOptions
from recipes.report.run_files import data_file, files_read, run_options
from recipes.report.run_labels import MovedLabel, moved_labels, run_labels
from recipes.report.run_weights import RunWeights, effective_share, histogram, read_run_weights
from recipes.terminal import printable, say

_BINS = 16
_WIDTH = 40
_NAMES = {"initial_loss": "loss before", "raw_weight": "raw", "visits": "visits"}


def run_weights(options: WeightsOptions) -> None:
    """Print the weights of a run, or write them.

    Raises:
        OptionError: There is no such run, it has no weights, or an output cannot be written so.
        DataError: The weights and the data file do not belong to each other.
        OSError: An output cannot be written.
    """
    check_together(options)
    directory = Path(options.directory)
    data = data_file(run_options(directory), options.data)
    weights = read_run_weights(directory, data)
    if options.export is not None:
        inputs = files_read(directory, data)
        export_table(weights, options.export, overwrite=options.overwrite, inputs=inputs)
        say(f"{options.export}: {len(weights.ids):,} examples")
    if options.annotate is not None:
        counts = annotate(
            weights,
            directory,
            data,
            options.annotate,
            options.column,
            overwrite=options.overwrite,
        )
        left = f", {counts.without:,} without a weight (the run left them out)"
        left = left if counts.without else ""
        say(f"{options.annotate}: {counts.rows:,} rows, {counts.weighted:,} with weights{left}")
    if options.export is None and options.annotate is None:
        labels = moved_labels(run_labels(directory))
        described = page(directory, weights, options.top, learned_labels=bool(labels))
        for line in (*described, *label_table(labels, options.top)):
            print(printable(line))


def page(
    directory: Path, weights: RunWeights, top: int, *, learned_labels: bool = False
) -> Iterator[str]:
    """Yield the lines of the page; no loss is multiplied by what stands beside learned labels."""
    values = weights.weight
    share = "" if learned_labels else f", effective sample size {effective_share(values):.0%}"
    yield (
        f"{directory}: {len(values):,} weights, {values.min():.3f} to {values.max():.3f}, "
        f"mean {values.mean():.3f}{share}"
    )
    if values.min() == values.max():
        yield "all weights are equal: there is no order to show"
        return
    order = weights.order()
    top = min(top, len(order) // 2)
    yield ""
    yield from _table(weights, "highest", order[:top].tolist())
    yield ""
    yield from _table(weights, "lowest", order[::-1][:top].tolist())
    for kind, groups in weights.groups.items():
        yield ""
        width = max(len(kind) + 3, *(len(printable(name)) for name in groups))
        yield f"{f'by {kind}':<{width}}{'count':>9}{'mean':>9}{'10 %':>9}{'median':>9}{'90 %':>9}"
        for name, rows in groups.items():
            own = values[rows]
            cells = [own.mean(), *np.quantile(own, [0.1, 0.5, 0.9])]
            figures = "".join(f"{cell:>9.3f}" for cell in cells)
            yield f"{printable(name):<{width}}{len(own):>9,}{figures}"
    if weights.absent is not None:
        yield ""
        yield f"by source, by domain: not shown, {weights.absent}; give --data"
    yield ""
    yield from _bars(weights)


def label_table(labels: Sequence[MovedLabel], top: int) -> Iterator[str]:
    """Yield the lines on learned labels: how many were turned over, and which moved most."""
    if not labels:
        return
    turned = sum(label.turned_over for label in labels)
    yield ""
    yield (
        f"learned labels: {turned:,} of {len(labels):,} were turned over; a weight is 1 minus how "
        "far the labels of the example moved, on average"
    )
    yield f"{'moved most':<10}{'given':>9}{'learned':>9}  step  id"
    for place, label in enumerate(labels[:top], start=1):
        figures = f"{label.given:>9.3g}{label.learned:>9.3f}{label.step:>6}"
        yield f"{place:>10}{figures}  {label.id}"


def _table(weights: RunWeights, title: str, rows: Sequence[int]) -> Iterator[str]:
    names = [name for name in _NAMES if name in weights.columns]
    heads = "".join(f"{_NAMES[name]:>13}" for name in names)
    origins = [("source", weights.sources), ("domain", weights.domains)]
    origins = [(kind, values) for kind, values in origins if any(values)]
    yield f"{title:<9}{'weight':>9}{heads}  id" + "".join(f", {kind}" for kind, _ in origins)
    for place, row in enumerate(rows, start=1):
        cells = "".join(f"{weights.columns[name][row]:>13.4g}" for name in names)
        said = "".join(f", {values[row]}" for _, values in origins)
        yield f"{place:>9}{weights.weight[row]:>9.3f}{cells}  {weights.ids[row]}{said}"


def _bars(weights: RunWeights) -> Iterator[str]:
    counts, edges = histogram(weights.weight, _BINS)
    yield f"{'weight':>17}{'examples':>10}"
    for count, low, high in zip(counts.tolist(), edges[:-1], edges[1:], strict=True):
        length = -(-count * _WIDTH // int(counts.max()))  # no bar of nothing for a few examples
        yield f"{low:>8.3f} {high:>8.3f}{count:>10,} {'#' * length}".rstrip()
