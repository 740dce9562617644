"""The figures of a report, drawn with matplotlib from the numbers of its runs.

Readable without colour: runs differ by the style of their lines and the shape of their marks, parts
of bars by their hatch. Names come from users' files, so that nothing in them is taken for
matplotlib's notation of formulas.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from recipes.report.numbers import FileResults, RunNumbers, Series
from recipes.report.run_weights import RunWeights
from recipes.terminal import printable

_COLOURS = ("#1b4f8f", "#c2571a", "#3a7d44", "#7b3f8c", "#8a6d00", "#555555")
_LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
_HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++")
_WIDTH = 7.2  # inches, of every figure
_MOST_GROUPS = 12
_BINS = 24
_MOST_POINTS = 5_000
_DOTS_PER_INCH = 150


@dataclass(frozen=True)
class Picture:
    """A figure of the page.

    Attributes:
        name: The name of its file, without ``.png``.
        title: Its title.
        caption: What it shows and how to read it.
        png: The picture.
    """

    name: str
    title: str
    caption: str
    png: bytes


def plain(text: str, most: int = 32) -> str:
    """Return a name for a figure: one short line, in which ``$`` begins no formula."""
    shown = printable(text)
    shown = shown if len(shown) <= most else f"{shown[: most - 1]}…"
    return shown.replace("$", r"\$")


def results(runs: Sequence[RunNumbers], file: str) -> Picture | None:
    """Draw the accuracy of every selector with its interval; a row of one run or several."""
    parts = [(place, part) for place, run in enumerate(runs) for part in _of(run, file)]
    if not parts:
        return None
    rows: list[tuple[str, int, float, float, float]] = []
    seen: set[tuple[str, float]] = set()
    for place, part in parts:
        for row in part.rows:
            model = row.name == runs[place].method
            if not model and (row.name, row.mean) in seen:
                continue  # the same candidates give the same value in every run
            seen.add((row.name, row.mean))
            name = plain(row.label, 36)
            if model and len(runs) > 1:
                name = f"{name}\n{plain(runs[place].name, 36)}"
            rows.append((name, place if model else -1, row.mean, row.low, row.high))
    rows.sort(key=lambda row: row[1] >= 0)
    figure, axes = blank_axes(0.42 * len(rows) + 1.0, grid="x")
    for height, (_, place, mean, low, high) in enumerate(reversed(rows)):
        colour = "#333333" if place < 0 else _COLOURS[place % len(_COLOURS)]
        mark = "|" if place < 0 else _MARKS[place % len(_MARKS)]
        axes.plot([low, high], [height, height], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot([mean], [height], mark, color=colour, markersize=9, markeredgewidth=2)
        axes.annotate(
            f"{mean:.3f}",
            (1.02, height),
            xycoords=("axes fraction", "data"),
            verticalalignment="center",
        )
    axes.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("share of questions with a right answer selected, and 95 % interval")
    questions = parts[0][1].questions
    return _picture(
        figure,
        f"results-{file}",
        f"Best-of-N accuracy, {file} set",
        f"Means over {questions:,} questions; lines are 95 % bootstrap intervals over questions. "
        "Small bars belong to selectors that use no model; the oracle (pass@N) is what "
        "no selector can exceed.",
    )


def best_of_k(runs: Sequence[RunNumbers]) -> Picture | None:
    """Draw the accuracy of the best of k candidates over k, and the oracle's."""
    curves = [(n, run, part) for n, run in enumerate(runs) for part in _of(run, "test")]
    curves = [(n, run, part) for n, run, part in curves if part.best_of_k]
    if not curves:
        return None
    figure, axes = blank_axes(3.6)
    for n, run, part in curves:
        ks = range(1, len(part.best_of_k) + 1)
        axes.plot(ks, part.best_of_k, label=plain(run.name), **line_style(n, mark=True))
    oracle = curves[0][2].pass_at_k
    axes.plot(range(1, len(oracle) + 1), oracle, ":", color="#333333", label="oracle (pass@k)")
    axes.axhline(oracle[0], color="#333333", linewidth=0.8, label="random candidate")
    axes.set_xticks(range(1, len(oracle) + 1))
    axes.set_xlabel("candidates k")
    axes.set_ylabel("accuracy")
    legend(axes)
    return _picture(
        figure,
        "best-of-k",
        "Best of k",
        "The accuracy of the candidate of highest score among k, on average over all choices of k "
        "candidates of a question.",
    )


def losses(runs: Sequence[RunNumbers]) -> Picture | None:
    """Draw both losses over the steps."""
    parts = [("lower_loss", "lower loss"), ("upper_loss", "upper loss")]
    return _over_steps(
        runs,
        parts,
        "losses",
        "Losses of both levels",
        "Lower: weighted cross-entropy of the training batches. Upper: the loss of the meta "
        "batches.",
    )


def dev_set(runs: Sequence[RunNumbers]) -> Picture | None:
    """Draw what ``--eval-every`` measured on the development set, over the steps."""
    parts = [("best_of_n", "best-of-N\naccuracy"), ("step_auc", "step AUC")]
    kept = " A vertical line: the step of the model." if any(run.kept for run in runs) else ""
    return _over_steps(
        runs,
        parts,
        "dev-over-steps",
        "The development set over the steps",
        f"The accuracy of selection, and the AUC of the step scores against the labels.{kept}",
        kept=True,
    )


def moved_labels(runs: Sequence[RunNumbers]) -> Picture | None:
    """Draw how far learned labels moved over the steps."""
    parts = [("labels/moved", "mean of those\nthat moved"), ("labels/most", "largest")]
    return _over_steps(
        runs,
        parts,
        "labels-over-steps",
        "Learned labels over the steps",
        "How far the labels of steps are from where they began, in logits.",
    )


def trajectories(runs: Sequence[RunNumbers]) -> Picture | None:
    """Draw the range and the effective sample size of the weights over the steps."""
    runs_with = [run for run in runs if "weights/ess" in run.log and not _constant(run)]
    if not runs_with:
        return None
    figure, (above, below) = blank_axes(4.8, 2)
    for n, run in enumerate(runs):
        if run not in runs_with:
            continue
        style = line_style(n)
        low, high = run.log["weights/min"], run.log["weights/max"]
        smooth_low, smooth_high = _smooth(low.values), _smooth(high.values)
        above.fill_between(
            low.steps, smooth_low, smooth_high, color=style["color"], alpha=0.12, linewidth=0
        )
        above.plot(low.steps, smooth_low, **style)
        above.plot(high.steps, smooth_high, label=plain(run.name), **style)
        ess = run.log["weights/ess"]
        below.plot(ess.steps, 100 * _smooth(ess.values), label=plain(run.name), **style)
    above.axhline(1.0, color="#333333", linewidth=0.8)
    above.set_ylabel("weight, least\nand largest")
    below.set_ylabel("effective\nsample size, %")
    below.set_ylim(0, 105)
    below.set_xlabel("lower steps")
    legend(above)
    return _picture(
        figure,
        "trajectories",
        "Weights over the steps",
        "Above: the least and the largest weight of the training batches. Below: how many equally "
        "weighted examples a batch is worth (Kish), as a share. Running means of the log; what "
        "single examples weighed before the end is not recorded.",
    )


def seconds(runs: Sequence[RunNumbers]) -> Picture | None:
    """Draw the seconds of each part of the runs."""
    timed = [run for run in runs if run.seconds]
    if not timed:
        return None
    parts = list(dict.fromkeys(part for run in timed for part in run.seconds))
    figure, axes = blank_axes(0.45 * len(timed) + 1.3, grid="x")
    starts = np.zeros(len(timed))
    for n, part in enumerate(parts):
        lengths = np.array([run.seconds.get(part, 0.0) for run in timed])
        axes.barh(
            range(len(timed)),
            lengths,
            left=starts,
            height=0.6,
            label=plain(part.replace("_", " ")),
            color="white",
            edgecolor=_COLOURS[n % len(_COLOURS)],
            hatch=_HATCHES[n % len(_HATCHES)],
        )
        starts += lengths
    axes.set_yticks(range(len(timed)), [plain(run.name) for run in timed])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
    return _picture(figure, "seconds", "Time per part", "Wall time of the parts of each run.")


def weights_by(weights: RunWeights, kind: str, name: str) -> Picture:
    """Draw a histogram of the weights of every source or domain, or of all (``kind`` "all")."""
    groups = weights.groups.get(kind, {"all examples": np.arange(len(weights.ids))})
    ranked = sorted(groups.items(), key=lambda item: -len(item[1]))
    shown = sorted(ranked[:_MOST_GROUPS], key=lambda item: -weights.weight[item[1]].mean())
    figure, several = blank_axes(max(0.78 * len(shown) + 0.7, 2.6), len(shown), grid="")
    low, high = float(weights.weight.min()), float(weights.weight.max())
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    for axes, (group, rows) in zip(np.atleast_1d(several), shown, strict=True):
        own = weights.weight[rows]
        axes.hist(own, edges, color="#cfd8e6", edgecolor="#1b4f8f", linewidth=0.8)
        axes.axvline(own.mean(), color="#c2571a", linestyle="--", linewidth=1.6)
        axes.set_yticks([])
        axes.set_ylabel(
            f"{plain(group, 20)}\nn {len(own):,}, mean {own.mean():.2f}",
            rotation=0,
            horizontalalignment="right",
            verticalalignment="center",
        )
    np.atleast_1d(several)[-1].set_xlabel("weight")
    left = len(ranked) - len(shown)
    more = f" The {left} smallest are not shown." if left else ""
    of = "all examples" if kind not in weights.groups else f"each {kind}"
    return _picture(
        figure,
        f"{name}-weights-{kind}",
        "Weights of all examples" if kind not in weights.groups else f"Weights by {kind}",
        f"Histograms of the weights of {of} at the end of the run, each of its own height; the "
        f"dashed line is the mean.{more}",
    )


def weight_against_loss(weights: RunWeights, name: str) -> Picture | None:
    """Draw every weight over the loss of its example under the initial model."""
    loss = weights.columns.get("initial_loss")
    if loss is None:
        return None
    figure, axes = blank_axes(4.2)
    groups = weights.groups.get("source") or weights.groups.get("domain") or {}
    kind = "source" if "source" in weights.groups else "domain"
    ranked = sorted(groups.items(), key=lambda item: -len(item[1]))[: len(_MARKS)]
    spread = np.random.default_rng(0)
    for n, (group, rows) in enumerate(ranked or [("", np.arange(len(loss)))]):
        most = max(1, _MOST_POINTS // max(1, len(ranked)))
        if len(rows) > most:
            rows = spread.choice(rows, most, replace=False)
        axes.plot(
            loss[rows],
            weights.weight[rows],
            _MARKS[n],
            color=_COLOURS[n % len(_COLOURS)],
            fillstyle="none" if n % 2 else "full",
            markersize=4,
            alpha=0.7,
            label=plain(group) if group else None,
        )
    axes.set_xlabel("loss under the initial model")
    axes.set_ylabel("weight")
    if ranked:
        legend(axes)
    shapes = f" Shapes are the {kind}s." if ranked else ""
    left = len(groups) - len(ranked)
    more = f" The {left} smallest are not shown." if left > 0 else ""
    return _picture(
        figure,
        f"{name}-weight-loss",
        "Weight against initial loss",
        "Each point is an example. A falling cloud says that examples of large initial loss were "
        f"weighted down.{shapes}{more}",
    )


def _of(run: RunNumbers, file: str) -> list[FileResults]:
    return [part for part in run.files if part.file == file]


def _constant(run: RunNumbers) -> bool:
    return set(run.log["weights/min"].values) == set(run.log["weights/max"].values) == {1.0}


def _over_steps(
    runs: Sequence[RunNumbers],
    parts: Sequence[tuple[str, str]],
    name: str,
    title: str,
    caption: str,
    *,
    kept: bool = False,
) -> Picture | None:
    parts = [(key, label) for key, label in parts if any(key in run.log for run in runs)]
    if not parts:
        return None
    figure, several = blank_axes(2.3 * len(parts) + 0.4, len(parts))
    for axes, (key, label) in zip(np.atleast_1d(several), parts, strict=True):
        for n, run in enumerate(runs):
            if key in run.log:
                _curve(axes, run.log[key], plain(run.name), line_style(n))
                if kept and run.kept is not None:
                    axes.axvline(run.kept, **line_style(n) | {"linewidth": 0.8})
        axes.set_ylabel(label)
    legend(np.atleast_1d(several)[0])
    np.atleast_1d(several)[-1].set_xlabel("lower steps")
    drawn = [run.log[key].values for key, _ in parts for run in runs if key in run.log]
    if any(map(_half_width, drawn)):
        caption += " Thin: the lines of the log; thick: their running mean."
    return _picture(figure, name, title, caption)


def _curve(axes: Any, series: Series, label: str, style: Mapping[str, Any]) -> None:
    axes.plot(series.steps, series.values, color=style["color"], alpha=0.25, linewidth=0.8)
    axes.plot(series.steps, _smooth(series.values), label=label, **style)


def _smooth(values: Sequence[float]) -> Any:
    """Return the running mean over a twentieth of the values, shorter at the ends."""
    half = _half_width(values)
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=float))])
    places = np.arange(len(values))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _half_width(values: Sequence[float]) -> int:
    return len(values) // 40


def line_style(n: int, mark: bool = False) -> dict[str, Any]:
    """Return colour, dashes and, if asked for, the mark of the n-th line of a figure."""
    style: dict[str, Any] = {
        "color": _COLOURS[n % len(_COLOURS)],
        "linestyle": _LINES[n % len(_LINES)],
        "linewidth": 2,
    }
    return {**style, "marker": _MARKS[n % len(_MARKS)]} if mark else style


def blank_axes(
    height: float, rows: int = 1, *, grid: Literal["x", "y", ""] = "y"
) -> tuple[Any, Any]:
    """Return a figure of some height in inches, and its axes or those of each row."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(_WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)  # inches
    several = figure.subplots(rows, sharex=True)
    for axes in np.atleast_1d(several):
        axes.spines[["top", "right"]].set_visible(False)
        if grid:
            axes.grid(axis=grid, alpha=0.3)
        axes.set_axisbelow(True)
    return figure, several


def legend(axes: Any) -> None:
    """Put the names of the lines to the right of the axes; one line needs no name."""
    _, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, handlelength=3)


def _picture(figure: Any, name: str, title: str, caption: str) -> Picture:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Names in a script that the font lacks are drawn as boxes; the page itself shows them.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
    return Picture(name, title, caption, buffer.getvalue())
