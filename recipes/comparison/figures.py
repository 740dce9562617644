"""Three figures of a comparison: best of k, weights by source, accuracy against corruption.

``python -m recipes.comparison.figures --input results/compare.json --output docs/figures`` draws
them (extra ``report``). Readable without colour, as those of ``recipes.report``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recipes.evaluation.table import label_of
from recipes.report.drawing import blank_axes, legend, line_style

_CURVES = ("clean_oracle", "instance_net", "instance_table", "meta_only", "no_selection")
_WEIGHED = ("instance_net", "instance_table")
_CORRUPTED = ("clean_oracle", "instance_net", "instance_table", "no_selection")
_USUAL_SHARE = 70  # % of the solutions from bad sources in the task itself
_DOTS_PER_INCH = 110


def best_of_k(report: Mapping[str, Any]) -> Any:
    """Draw the expected accuracy of the best of k candidates, and the oracle's (pass@k)."""
    figure, axes = blank_axes(3.6)
    names = [name for name in _CURVES if name in report["best_of_k"]]
    for n, name in enumerate(names):
        values = report["best_of_k"][name]
        axes.plot(_counted(values), values, label=label_of(name), **line_style(n, mark=True))
    oracle = report["pass_at_k"]
    axes.plot(_counted(oracle), oracle, ":", color="#333333", label="oracle (pass@k)")
    axes.set_xticks(_counted(oracle))
    axes.set_xlabel("candidates k")
    axes.set_ylabel("accuracy")
    legend(axes)
    return figure


def weights_by_source(report: Mapping[str, Any]) -> Any:
    """Draw the mean weight of each source, averaged over seeds; bars span the seeds."""
    figure, axes = blank_axes(3.2)
    names = [name for name in _WEIGHED if name in report["runs"]]
    sources: list[str] = sorted(
        report["runs"][names[0]][0]["sources"],
        key=lambda source: -float(np.mean(_means(report, names[0], source))),
    )
    for n, name in enumerate(names):
        means = [_means(report, name, source) for source in sources]
        places = np.arange(len(sources)) + 0.2 * (n - (len(names) - 1) / 2)
        middle = [float(np.mean(values)) for values in means]
        ends = [[m - min(v), max(v) - m] for m, v in zip(middle, means, strict=True)]
        style = line_style(n, mark=True) | {"linestyle": "none", "markersize": 8}
        axes.errorbar(places, middle, np.transpose(ends), label=label_of(name), **style)
    axes.set_xticks(range(len(sources)), sources)
    axes.axhline(1, color="#333333", linewidth=0.8)
    axes.set_ylabel("mean weight")
    axes.set_ylim(bottom=0)
    legend(axes)
    return figure


def corruption(report: Mapping[str, Any]) -> Any:
    """Draw the accuracy over the share of solutions from bad sources, stopped on dev."""
    figure, axes = blank_axes(3.6)
    for n, name in enumerate(_CORRUPTED):
        shares = {
            int(setting["value"].removesuffix(" %")): setting["per_seed"]
            for setting in report["settings"].values()
            if setting["group"] == "corruption" and setting["of"] == name
        }
        if not shares:
            continue
        # Of the seeds of the settings, of which there may be fewer than of the rows.
        seeds = min(map(len, shares.values()))
        shares[_USUAL_SHARE] = [run["accuracy"] for run in report["runs"][name][:seeds]]
        style = line_style(n, mark=True)
        axes.plot(
            sorted(shares),
            [float(np.mean(shares[share])) for share in sorted(shares)],
            label=label_of(name),
            **style,
        )
    axes.set_xlabel("solutions from bad sources (%)")
    axes.set_ylabel("best-of-8 accuracy")
    legend(axes)
    return figure


FIGURES = {
    "compare-best-of-k": best_of_k,
    "compare-weights": weights_by_source,
    "compare-corruption": corruption,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the figures of a ``compare.json`` into a folder."""
    parser = argparse.ArgumentParser(prog="recipes.comparison.figures", description=__doc__)
    parser.add_argument("--input", default="results/compare.json", help="what compare has written")
    parser.add_argument("--output", default="docs/figures", help="folder of the PNG files")
    options = parser.parse_args(arguments)
    report = json.loads(Path(options.input).read_text(encoding="utf-8"))
    Path(options.output).mkdir(parents=True, exist_ok=True)
    varied = {setting["group"] for setting in report["settings"].values()}
    for name, draw in FIGURES.items():
        if draw is corruption and "corruption" not in varied:
            print(f"{name}: {options.input} has no such settings")
            continue
        path = Path(options.output) / f"{name}.png"
        draw(report).savefig(path, dpi=_DOTS_PER_INCH, metadata={"Software": None})
        print(path)


def _counted(values: Sequence[float]) -> range:
    return range(1, len(values) + 1)


def _means(report: Mapping[str, Any], name: str, source: str) -> list[float]:
    return [run["sources"][source]["mean_weight"] for run in report["runs"][name]]


if __name__ == "__main__":
    main()
