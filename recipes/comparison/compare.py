"""The command that computes every row of the comparison over seeds and writes ``compare.json``.

Each seed has its own data set, test set included, its own cold start, and one run per row. Every
row is there twice: with its last model, and, as ``<row>_dev_stopped``, with the model of the step
that is best on the dev set (``--keep-best``). A complete run is not repeated, so an interrupted
comparison resumes. Runs are spread over processes of one thread each, on which no figure depends.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from prm.digests import digest_file
from recipes.comparison.rows import QUICK, ROWS, Row
from recipes.comparison.runs import Seed, is_shared, questions_of, results_of
from recipes.comparison.settings import SETTINGS, Setting
from recipes.comparison.statistics import Values, difference, statistics, stopped_name
from recipes.evaluation.table import comparison_table, settings_table
from recipes.options.embedded import CompareOptions
from recipes.options.values import OptionError
from recipes.run.errors import StepError
from recipes.run.files import check_writable, write_json
from recipes.run.provenance import environment
from recipes.terminal import progress_bar

_KEPT_RESULTS = (
    "weight_auc",
    "sources",
    "step_auc",
    "step_macro_f1",
    "seconds",
    "dev",
    "model_selection",
)


@dataclass(frozen=True)
class _Part:
    """One part of the work, in an order in which nothing waits for a later stage.

    Attributes:
        stage: 0: a cold start, with its data set; 1: a run that needs no other; 2: one that does.
        name: The data set or the row.
    """

    seed: Seed
    stage: Literal[0, 1, 2]
    name: str


def compare(options: CompareOptions) -> dict[str, Any]:
    """Run the missing runs, resume the interrupted ones, write and print ``compare.json``.

    Raises:
        OptionError: A method is unknown.
        StepError: A row cannot be trained; others that need no learned weights are.
        WriteError: An output cannot be written.
    """
    first, count = options.first_seed, 1 if options.quick else options.seeds
    rows, settings = _wanted(options)
    check_writable("--output-dir", Path(options.output_dir) / "compare.json")
    check_writable("--work-dir", Path(options.work_dir) / "seed-0")
    work = Path(options.work_dir)
    seeds = [Seed(number, work / f"seed-{number}") for number in range(first, first + count)]
    varied = seeds[: options.setting_seeds]
    _run(
        [_Part(seed, *part) for seed in seeds for part in _parts(rows)]
        + [_Part(seed, *part) for seed in varied for part in _parts(settings)],
        options,
    )
    report: dict[str, Any] = {
        **statistics([_values(seed, rows) for seed in seeds]),
        "best_of_k": {name: _curve(seeds, name, "best_of_k") for name in rows},
        "pass_at_k": _curve(seeds, rows[0], "pass_at_k"),
        "runs": {name: [_kept(seed, name) for seed in seeds] for name in rows},
        "settings": {name: _setting(varied, name) for name in settings},
        "test_sha256": {str(seed.number): digest_file(seed.test_file) for seed in seeds},
        "environment": environment(),
    }
    write_json(Path(options.output_dir) / "compare.json", report)
    print("\n" + comparison_table(report))
    if report["settings"]:
        print("\n" + settings_table(report))
    return report


def _wanted(options: CompareOptions) -> tuple[list[str], list[str]]:
    """Return the names of the rows and of the settings to compute."""
    for name in options.methods:
        if name not in ROWS and name not in SETTINGS:
            raise OptionError(
                f"--methods: unknown {name!r}; expected among {', '.join([*ROWS, *SETTINGS])}"
            )
    if options.methods:
        rows = [name for name in options.methods if name in ROWS]
        settings = [name for name in options.methods if name in SETTINGS]
        rows += [of for name in settings if (of := SETTINGS[name].of) not in rows]
        return list(dict.fromkeys(rows)), settings
    return (list(QUICK), []) if options.quick else (list(ROWS), list(SETTINGS))


def _row(name: str) -> Row:
    return ROWS[name] if name in ROWS else SETTINGS[name].row


def _parts(names: Sequence[str]) -> list[tuple[Literal[0, 1, 2], str]]:
    """Return the stage and the name of every part of the work for some rows of a seed."""
    cold = dict.fromkeys(start for name in names if (start := _row(name).start) is not None)
    needed = dict.fromkeys(w.of for name in names if (w := _row(name).weights) is not None)
    every = dict.fromkeys([*names, *needed])
    return [
        *((0, data) for data in cold),
        *((1, name) for name in every if _row(name).weights is None),
        *((2, name) for name in every if _row(name).weights is not None),
    ]


def _run(parts: Sequence[_Part], options: CompareOptions) -> None:
    """Do all parts, those of a stage side by side in processes; one bar shows how far it is.

    Raises:
        StepError: Some cannot be trained; all others of their stage are done.
    """
    parts = sorted(dict.fromkeys(parts), key=lambda part: part.stage)
    jobs = min(options.jobs or os.cpu_count() or 1, len(parts))
    failed: list[str] = []
    with progress_bar("compare", len(parts), shown=options.progress) as bar:

        def done(part: _Part, error: StepError | None) -> None:
            name = f"seed {part.seed.number} {part.name}"
            if error is not None:
                failed.append(name)
                tqdm.write(f"{name}: {error}", file=sys.stderr)
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        for stage in (0, 1, 2):
            of_stage = [part for part in parts if part.stage == stage]
            if jobs == 1:
                for part in of_stage:
                    done(part, _do(part))
            elif of_stage:
                _side_by_side(of_stage, jobs, done)
            if failed:  # The next stage goes on from what this one was to train.
                raise StepError(
                    f"{', '.join(failed)}: cannot be trained (see above), so that compare.json is "
                    "not written; what else is complete is kept, and --methods names what to "
                    "compute without them"
                )


def _side_by_side(
    parts: Sequence[_Part], jobs: int, done: Callable[[_Part, StepError | None], None]
) -> None:
    # Not forked: a process that has computed with torch's threads must not be.
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_await_the_parent) as pool:
        futures = {pool.submit(_do, part): part for part in parts}
        try:
            for future in as_completed(futures):
                done(futures[future], future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.terminate()  # a run that trains stops after its step, with a checkpoint
            raise


def _await_the_parent() -> None:
    """Leave Ctrl-C, which reaches all processes of a terminal, to the one that started this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _do(part: _Part) -> StepError | None:
    """Do a part; what its runs print goes into a file of its own.

    Returns:
        Why it cannot be trained, which does not keep others from it; None: it is done.
    """
    log = part.seed.directory / "logs" / f"{part.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            if part.stage == 0:
                part.seed.cold_start(part.name)
            else:
                part.seed.row(part.name, _row(part.name))
                part.seed.last(part.name)
        except StepError as error:
            return error
    return None


def _results(seed: Seed, name: str) -> Mapping[str, Any]:
    return results_of(seed.row(name, _row(name)))


def _values(seed: Seed, names: Sequence[str]) -> Values:
    """Return the values of rows, with the last models and with those stopped on dev."""
    values: Values = {}
    for name in names:
        values |= questions_of(seed.last(name), name)
        if _row(name).trains:
            values |= questions_of(seed.row(name, _row(name)), stopped_name(name))
    return values


def _kept(seed: Seed, name: str) -> dict[str, Any]:
    """Return what ``compare.json`` keeps of a run: that of the model stopped on dev."""
    results = _results(seed, name)
    own = next(value for key, value in results["rows"].items() if not is_shared(key))
    kept = {key: results[key] for key in _KEPT_RESULTS if key in results}
    return {"seed": seed.number, "accuracy": own} | kept


def _curve(seeds: Sequence[Seed], name: str, key: str) -> list[float]:
    """Return the mean over seeds of a curve over k = 1, 2, ..."""
    curves = [_results(seed, name)[key] for seed in seeds]
    return [round(float(value), 4) for value in np.mean(curves, axis=0)]


def _setting(seeds: Sequence[Seed], name: str) -> dict[str, Any]:
    """Return the figures of a setting, and how far it is above the row that it varies."""
    setting: Setting = SETTINGS[name]
    per_seed = [_values(seed, [setting.of, name]) for seed in seeds]
    own, base = (stopped_name(n) if setting.row.trains else n for n in (name, setting.of))
    runs = [_kept(seed, name) for seed in seeds]
    accuracies = [run["accuracy"] for run in runs]
    return {
        "group": setting.group,
        "value": setting.value,
        "of": setting.of,
        "accuracy": round(float(np.mean(accuracies)), 4),
        "last": round(float(np.mean([np.mean(values[name]) for values in per_seed])), 4),
        "per_seed": accuracies,
        **difference(per_seed, own, base),
        "runs": runs,
    }
