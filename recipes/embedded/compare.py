"""The comparison of all methods and controls on the embedded task over seeds: the README's table.

Each seed has its own data set, test set included, its own cold start, and one run per row of the
table. A complete run is not repeated, so an interrupted comparison resumes. Every row trains for
the same number of lower steps with the same options, and is there twice: with its last model, and,
as ``<row>_dev_stopped``, with the model of the step that is best on the dev set (``--keep-best``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from prm.digests import check_digest, write_digest
from recipes.embedded.build import build
from recipes.evaluation.table import DEV_STOPPED, comparison_table
from recipes.options.embedded import CompareOptions
from recipes.options.parse import changed, resolve
from recipes.options.train import ColdStartOptions, TrainOptions
from recipes.options.values import OptionError
from recipes.run.files import check_writable, write_json, write_text
from recipes.run.provenance import environment
from recipes.train.cold_start import run_cold_start
from recipes.train.training import run_training

_RESAMPLES = 10_000
_KEPT_RESULTS = (
    "weight_auc",
    "sources",
    "step_auc",
    "step_macro_f1",
    "seconds",
    "dev",
    "model_selection",
)
_EVAL_EVERY = 25  # lower steps
_KEPT_WEIGHT = 0.5  # An instance with a higher weight counts as kept.

Values = dict[str, np.ndarray]
Run = TypeVar("Run", ColdStartOptions, TrainOptions)


def compare(options: CompareOptions) -> dict[str, Any]:
    """Run the missing runs, resume the interrupted one, then write and print ``compare.json``.

    Raises:
        OptionError: A method is unknown.
        WriteError: An output cannot be written.
    """
    wanted = options.methods or tuple(_METHODS)
    for method in wanted:
        if method not in _METHODS:
            raise OptionError(
                f"--methods: unknown {method!r}; expected among {', '.join(_METHODS)}"
            )
    check_writable("--output-dir", Path(options.output_dir) / "compare.json")
    check_writable("--work-dir", Path(options.work_dir) / "seed-0")
    per_seed: list[Values] = []
    details: dict[str, list[dict[str, Any]]] = {}
    for seed in range(options.seeds):
        seed_dir = Path(options.work_dir) / f"seed-{seed}"
        if not (seed_dir / "data").exists():
            build(seed_dir / "data", seed=seed)
        make = _Maker(options, seed_dir, seed)
        if not (seed_dir / "cold-start" / "results.json").exists():
            run_cold_start(_gone_on_with(make.cold_start()))
        values: Values = {}
        for method in wanted:
            print(f"\nseed {seed}: {method}")
            directory = _METHODS[method](make)
            values |= _questions(make.last(directory), method)
            if method in _STOPPED:
                values |= _questions(directory, stopped_name(method))
            results = json.loads((directory / "results.json").read_text())
            details.setdefault(method, []).append(
                {"seed": seed, "accuracy": results["rows"].get(_own_row(results))}
                | {name: results[name] for name in _KEPT_RESULTS if name in results}
            )
        per_seed.append(values)
    report = {**statistics(per_seed), "runs": details, "environment": environment()}
    write_json(Path(options.output_dir) / "compare.json", report)
    print("\n" + comparison_table(report))
    return report


def statistics(per_seed: list[Values]) -> dict[str, Any]:
    """Return means over seeds, 95 % intervals, and paired differences to No Selection.

    The intervals are percentile bootstrap intervals, which draw seeds with replacement and, within
    each drawn seed, questions with replacement.

    Args:
        per_seed: For every seed a dict from row name to whether the selected candidate is right,
            [questions].

    Returns:
        The means ``rows`` and intervals ``ci95``, and ``difference`` and ``difference_ci95`` to
        ``no_selection`` on the same questions. If both rows exist and differ, also ``gap_closed`` =
        (row - no_selection) / (clean_oracle - no_selection), with its interval over the resamples
        in which they differ. Rows that are stopped on the dev set are compared with No Selection
        and the ceiling that are stopped so.
    """
    names = list(per_seed[0])
    rng = np.random.default_rng(0)
    draws: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(_RESAMPLES):
        seeds = rng.integers(0, len(per_seed), len(per_seed))
        means: dict[str, list[float]] = {name: [] for name in names}
        for seed in seeds:
            questions = len(per_seed[seed][names[0]])
            counts = rng.multinomial(questions, np.full(questions, 1 / questions)) / questions
            for name in names:
                means[name].append(float(counts @ per_seed[seed][name]))
        for name in names:
            draws[name].append(float(np.mean(means[name])))
    sample = {name: np.array(values) for name, values in draws.items()}
    mean = {name: float(np.mean([np.mean(values[name]) for values in per_seed])) for name in names}
    report: dict[str, Any] = {
        "seeds": len(per_seed),
        "n_questions": [len(values[names[0]]) for values in per_seed],
        "rows": {name: round(mean[name], 4) for name in names},
        "ci95": {name: _interval(sample[name]) for name in names},
        "per_seed": {
            name: [round(float(np.mean(values[name])), 4) for values in per_seed] for name in names
        },
    }
    for base, ceiling, others in (
        ("no_selection", "clean_oracle", [n for n in names if not n.endswith(DEV_STOPPED)]),
        (
            stopped_name("no_selection"),
            stopped_name("clean_oracle"),
            [name for name in names if name.endswith(DEV_STOPPED)],
        ),
    ):
        if base in others:
            others.remove(base)
            for key, values in _compared(mean, sample, base, ceiling, others).items():
                report.setdefault(key, {}).update(values)
    return report


def _compared(
    mean: Mapping[str, float],
    sample: Mapping[str, np.ndarray],
    base: str,
    ceiling: str,
    others: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Return the differences to ``base``, and how much of its gap to ``ceiling`` is closed."""
    low, low_sample = mean[base], sample[base]
    found: dict[str, dict[str, Any]] = {
        "difference": {name: round(mean[name] - low, 4) for name in others},
        "difference_ci95": {name: _interval(sample[name] - low_sample) for name in others},
    }
    if ceiling in mean and mean[ceiling] > low:
        gap, gap_sample = mean[ceiling] - low, sample[ceiling] - low_sample
        open_gap = gap_sample > 0  # A share of a gap of 0 is undefined.
        found["gap_closed"] = {name: round((mean[name] - low) / gap, 3) for name in others}
        found["gap_closed_ci95"] = {
            name: _interval((sample[name] - low_sample)[open_gap] / gap_sample[open_gap])
            for name in others
        }
    return found


def stopped_name(method: str) -> str:
    """Return the name of a method's row with the model of the best dev step."""
    return ("clean" if method == "clean_oracle" else method) + DEV_STOPPED


def _interval(sample: np.ndarray) -> list[float]:
    return [round(float(end), 4) for end in np.quantile(sample, (0.025, 0.975))]


class _Maker:
    """Starts the runs of one seed with their options."""

    def __init__(self, options: CompareOptions, directory: Path, seed: int) -> None:
        self.directory = directory
        self.common: dict[str, Any] = {
            "seed": seed,
            "threads": options.threads,
            "device": "cpu",  # whose figures are to be the same on every machine
            "progress": options.progress,
        }

    def cold_start(self) -> ColdStartOptions:
        return changed(
            resolve(ColdStartOptions, {"config": "cold-start"}),
            train_file=str(self.directory / "data" / "cold-start.jsonl"),
            output_dir=str(self.directory / "cold-start"),
            **self.common,
        )

    def run(self, name: str, preset: str, *, train: str = "train", **more: Any) -> Path:
        """Return the directory of the run ``name``, which is run unless it is complete."""
        data, directory = self.directory / "data", self.directory / name
        if (directory / "results.json").exists():
            return directory
        options = resolve(TrainOptions, {"config": preset})
        stops = more.get("steps") != 0  # without a step there is nothing to choose
        files = {
            "dev_file": str(data / "dev.jsonl") if stops else None,
            "test_file": str(data / "test.jsonl"),
        }
        if stops:
            more = {"eval_every": _EVAL_EVERY, "keep_best": True, **more}
        trusted = options.data.meta_file is not None
        meta = {"meta_file": str(data / "meta.jsonl")} if trusted else {}
        own = changed(
            options,
            train_file=str(data / f"{train}.jsonl"),
            output_dir=str(directory),
            on_existing="refuse",
            **{
                "init_from": str(self.directory / "cold-start" / "model"),
                **files,
                **meta,
                **self.common,
                **more,
            },
        )
        return run_training(_gone_on_with(own))

    def last(self, run: Path) -> Path:
        """Return the run that has scored the test set with the last model of a run."""
        if not (run / "last").is_dir():
            return run
        return self.run(
            f"{run.name}-last", "baseline", steps=0, init_from=str(run / "last" / "model")
        )

    def weights(self, run: Path) -> list[dict[str, Any]]:
        """Return the rows of a run's ``weights.jsonl``."""
        check_digest(run / "weights.jsonl")
        return [json.loads(line) for line in (run / "weights.jsonl").read_text().splitlines()]

    def with_weights(self, name: str, weights: Mapping[str, float]) -> Path:
        """Train without an upper level, with the given weights by id."""
        file = self.directory / f"{name}-weights.jsonl"
        lines = [json.dumps({"id": key, "weight": value}) for key, value in weights.items()]
        write_text(file, "\n".join(lines) + "\n")
        write_digest(file)
        return self.run(name, "baseline", weights_file=str(file))


def _gone_on_with(options: Run) -> Run:
    """Return the options of a run that resumes it, if it was begun already and interrupted."""
    begun = Path(options.output_dir)
    return changed(options, resume=str(begun)) if (begun / "args.yaml").exists() else options


def _shuffled(make: _Maker, source: str, name: str) -> Path:
    """Train with the weights that a run learned, permuted among the instances."""
    learned = make.weights(_METHODS[source](make))
    dealt = np.random.default_rng(make.common["seed"]).permutation([e["weight"] for e in learned])
    return make.with_weights(
        name, {entry["id"]: float(w) for entry, w in zip(learned, dealt, strict=True)}
    )


def _small_loss(make: _Maker) -> Path:
    """Train on the examples of smallest loss under the cold start, as many as the Table keeps."""
    table = _METHODS["instance_table"](make)
    entries = make.weights(table)
    kept = sum(entry["weight"] > _KEPT_WEIGHT for entry in entries)
    by_loss = sorted(entries, key=lambda entry: entry["initial_loss"])
    return make.with_weights(
        "small-loss", {entry["id"]: float(rank < kept) for rank, entry in enumerate(by_loss)}
    )


_METHODS: Mapping[str, Callable[[_Maker], Path]] = {
    "cold_start": lambda make: make.run("cold-start-evaluated", "baseline", steps=0),
    "no_selection": lambda make: make.run("no-selection", "baseline"),
    "instance_table": lambda make: make.run("table", "train-table"),
    "instance_net": lambda make: make.run("net", "train-net"),
    "domain_table": lambda make: make.run("domain", "train-domain"),
    "step_labels": lambda make: make.run("labels", "train-labels"),
    "clean_oracle": lambda make: make.run("clean", "baseline", train="clean"),
    "shuffled_table": lambda make: _shuffled(make, "instance_table", "shuffled-table"),
    "shuffled_net": lambda make: _shuffled(make, "instance_net", "shuffled-net"),
    "small_loss": _small_loss,
    "meta_only": lambda make: make.run(
        "meta-only",
        "baseline",
        lower_data="meta",
        meta_file=str(make.directory / "data" / "meta.jsonl"),
        steps=80,
        lower_lr=3e-4,  # rate and length chosen on the dev split, as those of the other rows
        lower_warmup=0.05,
        eval_every=10,
    ),
    "from_base": lambda make: make.run(
        "from-base", "baseline", init_from=None, steps=60, lower_warmup=0.05, eval_every=5
    ),
}
_STOPPED = frozenset(_METHODS) - {"cold_start"}


def _own_row(results: Mapping[str, Any]) -> str:
    rows: Mapping[str, Any] = results["rows"]
    return next(
        name for name in rows if not name.startswith("pass@") and name != "self_consistency"
    )


def _questions(directory: Path, method: str) -> Values:
    """Return the per-question values of a run, with its own row under the method's name."""
    lines = (directory / "test_questions.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    names = [name for name in entries[0] if name != "question"]
    shared = {name for name in names if name.startswith("pass@") or name == "self_consistency"}
    return {
        name if name in shared else method: np.array([entry[name] for entry in entries])
        for name in names
    }
