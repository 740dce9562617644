"""Training rows with wrong labels, or of rare classes: ``make noisy-labels``.

Weights that are learned on ten clean scans of each digit are compared with rules that need no upper
level. The core is used in ``recipes.problems.digit_reweighting``; this module runs the comparison.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bilevel import BilevelSolver, BilevelState, ReweightingProblem, WarmupCosine
from prm.evaluation.metrics import roc_auc
from recipes.options.base import option
from recipes.problems.digit_reweighting import (
    Batch,
    Params,
    Weighting,
    init_network,
    instance_table,
    inverse_frequency,
    logits,
    make_solver,
    meta_weight_net,
    small_loss,
    uniform,
)
from recipes.problems.digit_scans import (
    CLASSES,
    Scans,
    Splits,
    joined,
    long_tail,
    read_splits,
    with_mistaken_classes,
    with_wrong_labels,
)
from recipes.problems.report import check_options, mean_interval, percent, run_recipe, text_table

TITLES = {
    "uniform": "uniform weights",
    "meta_only": "clean meta rows only",
    "with_meta": "uniform, meta rows added",
    "small_loss": "small-loss filter",
    "inverse_frequency": "inverse class frequency",
    "meta_weight_net": "Meta-Weight-Net",
    "instance_table": "Instance Table",
    "ceiling": "ceiling: undamaged rows",
}
_ONLY = {"small_loss": False, "inverse_frequency": True}  # Whether a method is for the long tail.
_RATES = ("lower_lr", "table_lr", "net_lr")
_ENDS = 3  # The number of classes in the head, and in the tail.


@dataclass(frozen=True, kw_only=True)
class NoisyLabelOptions:
    """Options of the command. Rates, steps and warm-up were chosen on dev rows of other seeds."""

    long_tail: bool = option(False, "rare classes with right labels, instead of wrong labels")
    noise: Literal["spread", "classes"] = option(
        "spread",
        "wrong labels of all rows, any of the other nine; or of five classes, the same other class "
        "each time",
    )
    wrong_share: float = option(
        0.4, "share of the training labels (of those classes) that are wrong"
    )
    imbalance: float = option(20.0, "long tail: rows of the fullest class per row of the rarest")
    seed: int = option(0, "the first seed", least=0)
    seeds: int = option(
        4, "how many; each has its own split, damage, network and order of rows", least=1
    )
    steps: int = option(1000, "lower steps of every method", least=0)
    batch_size: int = option(50, "rows per lower step", least=1)
    hidden: int = option(256, "units in the hidden layer of the classifier")
    lower_lr: float = option(1e-3, "learning rate of AdamW")
    table_lr: float = option(0.05, "Instance Table: how far one visit can move a weight")
    net_lr: float = option(1e-3, "Meta-Weight-Net: learning rate of Adam")
    warm_up: int = option(30, "lower steps before learned weights may move")
    filter_after: int = option(100, "lower steps before the small-loss filter sets in")
    eval_every: int = option(20, "lower steps between looks at the dev rows (not timed)")
    targets: tuple[float, float] = option(
        (0.95, 0.99), "shares of the ceiling's dev score, the times to which are taken"
    )
    methods: tuple[str, ...] = option((), "rows of the table; default: all")
    threads: int = option(1, "CPU threads of torch (0: all cores)", least=0)
    output: str | None = option(None, "write every figure to this JSON file")

    def __post_init__(self) -> None:
        check_options(
            self,
            ("wrong_share", 0 < self.wrong_share < 1, "a share between 0 and 1"),
            ("imbalance", self.imbalance >= 1, "1 or more"),
            ("batch_size", self.batch_size >= 2, "2 or more: weights are compared in a batch"),
            ("hidden", self.hidden >= 1, "1 or more"),
            ("filter_after", self.filter_after >= 0, "0 or more"),
            ("warm_up", 0 <= self.warm_up < self.steps, "0 or more, less than --steps"),
            ("eval_every", 1 <= self.eval_every <= self.steps, "1 or more, --steps at most"),
            *((name, getattr(self, name) >= 0, "0 or more") for name in _RATES),
            ("targets", all(0 < share <= 1 for share in self.targets), "shares of at most 1"),
            (
                "methods",
                set(self.methods) <= set(self.known_methods()),
                f"names among {', '.join(self.known_methods())}",
            ),
        )

    def known_methods(self) -> list[str]:
        """Return every method that applies to the chosen corruption."""
        return [name for name in TITLES if _ONLY.get(name, self.long_tail) == self.long_tail]


class Task(NamedTuple):
    """The data of one seed: the splits, and their training rows after the corruption."""

    splits: Splits
    damaged: Scans
    ranked: Tensor | None  # The classes from the largest to the smallest; None without a long tail.


def make_task(options: NoisyLabelOptions, seed: int) -> Task:
    """Split the scans and corrupt the training rows."""
    generator = _generator(seed, 0)
    splits = read_splits(generator)
    if options.long_tail:
        return Task(splits, *long_tail(splits.train, options.imbalance, generator))
    spoil = with_wrong_labels if options.noise == "spread" else with_mistaken_classes
    return Task(splits, spoil(splits.train, options.wrong_share, generator), None)


def rows_of(method: str, task: Task) -> Scans:
    """Return the rows that a method trains on."""
    if method == "meta_only":
        return task.splits.meta
    if method == "with_meta":
        return joined(task.damaged, task.splits.meta)
    if method == "ceiling":
        return task.damaged[task.damaged.clean] if task.ranked is None else task.splits.train
    return task.damaged


def weighting_of(method: str, scans: Scans, options: NoisyLabelOptions, seed: int) -> Weighting:
    """Return the weighting of a method; learned weights have a cosine schedule."""
    upper_steps = options.steps - options.warm_up
    if method == "instance_table":
        return instance_table(len(scans), WarmupCosine(options.table_lr, 0, upper_steps))
    if method == "meta_weight_net":
        return meta_weight_net(WarmupCosine(options.net_lr, 0, upper_steps), _generator(seed, 1))
    if method == "small_loss":
        return small_loss(float(scans.clean.double().mean()), options.filter_after)
    return inverse_frequency(scans.y) if method == "inverse_frequency" else uniform()


def run_method(method: str, task: Task, options: NoisyLabelOptions, seed: int) -> dict[str, Any]:
    """Train once; return the figures of that run. Only the solver's steps are timed.

    Time is processor time over all threads, which other processes affect little. With one thread it
    equals the elapsed time on an idle machine.
    """
    scans, meta = rows_of(method, task), task.splits.meta
    weighting = weighting_of(method, scans, options, seed)
    solver = make_solver(weighting, options.lower_lr, options.warm_up)
    state = solver.init(init_network(options.hidden, _generator(seed, 2)), weighting.phi)
    upper = {"x": meta.x, "y": meta.y} if weighting.optimizer else None
    seconds, trace = 0.0, []
    best, at_best = -1.0, 0.0
    for batch in batches(scans, options, _generator(seed, 3)):
        started = time.process_time()
        state, _ = solver.step(state, [batch], upper)
        seconds += time.process_time() - started
        if int(state.lower_steps) % options.eval_every and int(state.lower_steps) < options.steps:
            continue
        dev = _score(state.lower_params, task.splits.dev, task)
        trace.append([round(seconds, 4), round(dev, 4)])
        if dev > best:
            best, at_best = dev, _score(state.lower_params, task.splits.test, task)
    figures = {
        "seed": seed,
        "test": _score(state.lower_params, task.splits.test, task),
        "dev": trace[-1][1],
        "test_at_best_dev": at_best,
        "seconds": seconds,
        "trace": trace,
    }
    return figures | _weight_figures(solver, state, scans, task)


def batches(
    scans: Scans, options: NoisyLabelOptions, generator: torch.Generator
) -> Iterator[Batch]:
    """Yield a batch per lower step, from successive shuffled passes over the rows."""
    size = min(options.batch_size, len(scans))
    queue = torch.empty(0, dtype=torch.int64)
    for step in range(options.steps):
        if len(queue) < size:
            queue = torch.cat([queue, torch.randperm(len(scans), generator=generator)])
        row, queue = queue[:size], queue[size:]
        yield {"x": scans.x[row], "y": scans.y[row], "row": row, "step": step}


@torch.no_grad()
def _score(theta: Params, scans: Scans, task: Task) -> float:
    """Return accuracy or, for the long tail, balanced accuracy, the mean over the classes."""
    right = logits(theta, scans.x).argmax(1) == scans.true
    if task.ranked is None:
        return float(right.double().mean())
    return float(_by_class(right, scans.true).mean())


def _by_class(values: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over the rows of every class, [10]."""
    return torch.stack([values[labels == digit].double().mean() for digit in range(CLASSES)])


@torch.no_grad()
def _weight_figures(
    solver: BilevelSolver[Params, Params, Batch],
    state: BilevelState[Params, Params],
    scans: Scans,
    task: Task,
) -> dict[str, float]:
    """Return how the final weights relate to the corruption, and recall in head and tail."""
    figures: dict[str, float] = {}
    problem = solver.problem
    assert isinstance(problem, ReweightingProblem)
    everything = {"x": scans.x, "y": scans.y, "row": torch.arange(len(scans)), "step": 1 << 30}
    losses, features = problem.losses(state.lower_params, everything)
    weights = problem.weights_of(state.upper_params, everything, features, losses)
    varied = bool((weights != weights[0]).any())
    if task.ranked is None:
        if varied:
            figures["weight_auc"] = float(roc_auc(scans.clean.numpy(), weights.numpy()))
        return figures
    test = task.splits.test
    right = (logits(state.lower_params, test.x).argmax(1) == test.true).double()
    for name, values, labels in (("recall", right, test.true), ("weight", weights, scans.y)):
        means = _by_class(values, labels)[task.ranked]
        figures[f"head_{name}"] = float(means[:_ENDS].mean())
        figures[f"tail_{name}"] = float(means[-_ENDS:].mean())
    return figures


def seconds_to(trace: Sequence[Sequence[float]], target: float) -> float | None:
    """Return the training time until the dev score first reached ``target``; None if never."""
    return next((seconds for seconds, score in trace if score >= target), None)


def compare(options: NoisyLabelOptions) -> tuple[str, dict[str, Any]]:
    """Learn with wrong labels, or with rare classes, on digit scans; a few clean scans say how."""
    seeds = range(options.seed, options.seed + options.seeds)
    methods = [
        name for name in options.known_methods() if name in options.methods or not options.methods
    ]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    for seed in seeds:
        task = make_task(options, seed)
        for name in methods:
            runs[name].append(run_method(name, task, options, seed))
            print(f"seed {seed}: {name} {runs[name][-1]['seconds']:.1f} s", file=sys.stderr)
    _take_times(runs, options.targets)
    return _table(runs, options), {"seeds": list(seeds), "rows": _summary(runs), "runs": runs}


def _take_times(runs: Mapping[str, list[dict[str, Any]]], shares: Sequence[float]) -> None:
    """Replace the traces by times to shares of the ceiling's last dev score in the same seed."""
    for rows in runs.values():
        for number, run in enumerate(rows):
            trace = run.pop("trace")
            if "ceiling" not in runs:
                continue
            ceiling = runs["ceiling"][number]["dev"]
            run["reached"] = [
                {
                    "share": share,
                    "dev": share * ceiling,
                    "seconds": seconds_to(trace, share * ceiling),
                    "at_the_end": run["dev"] >= share * ceiling,
                }
                for share in shares
            ]


def _summary(runs: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return means over seeds with 95 % intervals, and those of differences to two baselines."""
    rows: dict[str, Any] = {}
    for name, rows_of_name in runs.items():
        keys = [key for key, value in rows_of_name[0].items() if isinstance(value, float)]
        rows[name] = {key: mean_interval([run[key] for run in rows_of_name]) for key in keys}
        for base in ("uniform", "meta_only"):
            if base in runs and name != base:
                rows[name][f"minus_{base}"] = mean_interval(
                    [
                        run["test"] - other["test"]
                        for run, other in zip(rows_of_name, runs[base], strict=True)
                    ]
                )
    return rows


def _table(runs: Mapping[str, list[dict[str, Any]]], options: NoisyLabelOptions) -> str:
    rows = _summary(runs)
    score = "balanced test accuracy" if options.long_tail else "test accuracy"
    header = [
        "method",
        f"{score}, % (95 %)",
        "minus uniform (95 %)",
        "at best dev, %",
        *(["tail recall, %", "weight tail / head"] if options.long_tail else ["weights' AUC"]),
        "CPU seconds",
        *(f"to {100 * share:g} % of ceiling (seeds; at the end)" for share in options.targets),
    ]
    lines = [header]
    for name, row in rows.items():
        lines.append(
            [
                TITLES[name],
                percent(row["test"]),
                percent(row["minus_uniform"], sign=True) if "minus_uniform" in row else "",
                f"{100 * row['test_at_best_dev'].mean:.1f}",
                *_damage_cells(row, options),
                f"{row['seconds'].mean:.1f}",
                *(_time_cell(runs[name], target) for target in range(len(options.targets))),
            ]
        )
    return text_table(lines)


def _damage_cells(row: Mapping[str, Any], options: NoisyLabelOptions) -> list[str]:
    if not options.long_tail:
        return [f"{row['weight_auc'].mean:.3f}" if "weight_auc" in row else ""]
    weights = f"{row['tail_weight'].mean:.2f} / {row['head_weight'].mean:.2f}"
    return [f"{100 * row['tail_recall'].mean:.1f}", weights]


def _time_cell(runs: Sequence[Mapping[str, Any]], target: int) -> str:
    """Return the median time to a target, the seeds that reached it, and those there at the end."""
    if "reached" not in runs[0]:
        return ""
    reached = [run["reached"][target] for run in runs]
    times = [one["seconds"] for one in reached if one["seconds"] is not None]
    if not times:
        return "not reached"
    stayed = sum(one["at_the_end"] for one in reached)
    return f"{statistics.median(times):.2f} s ({len(times)} of {len(runs)}; {stayed})"


def _generator(seed: int, purpose: int) -> torch.Generator:
    """Return a generator per purpose, so that methods share split, network and order of rows."""
    return torch.Generator().manual_seed(10 * seed + purpose)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return run_recipe("recipes.problems.noisy_labels", NoisyLabelOptions, compare, arguments)


if __name__ == "__main__":
    sys.exit(main())
