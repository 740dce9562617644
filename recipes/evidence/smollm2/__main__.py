"""Real pretrained weights on real solutions: the comparison of methods, on a CPU.

Run by ``python -m recipes.evidence.smollm2 --data FILE [--task mathcheck]``.

SmolLM2-135M-Instruct (``recipes.evidence.smollm2.weights``) becomes a judge of the Game of 24
(``recipes.evidence.smollm2.game24``), of whose step labels most come from an annotator who believes
whatever a solution states (``recipes.evidence.smollm2.sources``); or of school problems with first
errors found by people (``recipes.evidence.smollm2.mathcheck``). Every row
(``recipes.evidence.smollm2.rows``) is a run of the project's own commands, and is there with its
last model and with that of its best step on the development set. The test set is scored once by
each of the two.

A seed takes an hour or more of processor time. What is finished in ``--work-dir`` is not done
again, and a run that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prm.aggregations import AGGREGATIONS
from prm.digests import check_digest, write_digest
from prm.evaluation.metrics import roc_auc
from recipes.comparison.runs import once, questions_of
from recipes.comparison.statistics import Values, statistics, stopped_name
from recipes.evaluation.candidates import (
    judged_steps,
    read_scored_candidates,
    solution_scores_of,
)
from recipes.evaluation.table import comparison_table, label_of
from recipes.evidence.smollm2 import game24, mathcheck, sources
from recipes.evidence.smollm2.position import position_scores
from recipes.evidence.smollm2.rows import AGGREGATION, KEPT, ROWS, Setup
from recipes.evidence.smollm2.weights import gguf_file, write_model
from recipes.models.loading import read_solutions
from recipes.options.base import LoaderOptions
from recipes.run.errors import reported
from recipes.run.files import check_writable, write_json, write_text
from recipes.run.provenance import environment, machine
from recipes.train.cold_start import run_cold_start
from recipes.train.training import run_training


@dataclass(frozen=True)
class Task:
    """What is judged.

    Attributes:
        file: The name of the file of solutions.
        write: What writes the files of a seed.
        sources: Where step labels come from, the right ones first.
        origin: How the file is had.
    """

    file: str
    write: Callable[..., Mapping[str, int]]
    sources: tuple[str, ...]
    origin: str


TASKS: Mapping[str, Task] = {
    "game24": Task(
        game24.FILE,
        game24.write_files,
        sources.SOURCES,
        "python -m recipes.evidence.smollm2.label --help says how to make it of what is published",
    ),
    "mathcheck": Task(
        mathcheck.FILE,
        mathcheck.write_files,
        mathcheck.SOURCES,
        "it holds the judged solutions of MathCheck-GSM, a line each (format mathcheck)",
    ),
}

PLACE = "place of the step only"
_KEPT_RESULTS = ("step_auc", "step_macro_f1", "model_selection", "weight_auc", "sources", "seconds")


def train_row(setup: Setup, name: str) -> None:
    """Train a row unless it is complete, and score the test set with its last model, too.

    The models are then removed: half a gigabyte each.
    """
    if name == "small_loss":
        _keep_small_losses(setup)
    run = once(setup.row(name), run_training)
    if (run / "last" / "model").is_dir():
        once(setup.last(name), run_training)
        shutil.rmtree(run / "last")
        shutil.rmtree(setup.run(f"{name}-last") / "model")
    shutil.rmtree(run / "model", ignore_errors=True)


def _keep_small_losses(setup: Setup) -> None:
    """Write weights 1 for the examples of smallest loss under the cold start, 0 for the others."""
    learned = setup.run("instance_table") / "weights.jsonl"
    check_digest(learned)
    entries = [json.loads(line) for line in learned.read_text().splitlines()]
    by_loss = sorted(entries, key=lambda entry: entry["initial_loss"])
    kept = {entry["id"] for entry in by_loss[: round(KEPT * len(entries))]}
    lines = [json.dumps({"id": e["id"], "weight": float(e["id"] in kept)}) for e in entries]
    file = setup.directory / "small-loss.jsonl"
    write_text(file, "\n".join(lines) + "\n")
    write_digest(file)


def is_complete(setup: Setup, name: str) -> bool:
    """Return whether both models of a row have scored the test set."""
    run = setup.run(name)
    return (run / "results.json").is_file() and not (run / "last").exists()


def values_of_row(setup: Setup, name: str) -> Values:
    """Return the per-question values of a row, of its last model and of that of its best step."""
    run, last = setup.run(name), setup.run(f"{name}-last")
    values = questions_of(last if last.is_dir() else run, name)
    if ROWS[name].get("steps") != 0:
        values |= questions_of(run, stopped_name(name))
    return values


def place_row(setup: Setup) -> tuple[np.ndarray, float]:
    """Return what a judge selects that knows the place of a step alone, and its AUC of steps.

    Returns:
        Whether the selected candidate is right, [questions], and the AUC.
    """
    train = read_solutions(LoaderOptions(), setup.file("clean")).examples
    test = read_scored_candidates(LoaderOptions(), setup.file("test"))
    scores = position_scores(train, test.data.examples)
    selected = test.best(solution_scores_of(scores, AGGREGATIONS[AGGREGATION]))
    return selected, float(roc_auc(*judged_steps(test, scores)))


def report_of(setups: Sequence[Setup], rows: Sequence[str]) -> dict[str, Any]:
    """Return the figures of complete rows over seeds."""
    per_seed: list[Values] = []
    place_auc = []
    for setup in setups:
        selected, auc = place_row(setup)
        values: Values = {PLACE: selected}
        for name in rows:
            values |= values_of_row(setup, name)
        per_seed.append(values)
        place_auc.append(auc)
    runs = {name: [_run_figures(setup, name) for setup in setups] for name in rows}
    return {**statistics(per_seed), "runs": runs, "place_auc": place_auc}


def _run_figures(setup: Setup, name: str) -> dict[str, Any]:
    """Return the figures of a run; all but the last one are of the model of the best step."""
    results = json.loads((setup.run(name) / "results.json").read_text())
    last = setup.run(f"{name}-last") / "results.json"
    found = {key: results[key] for key in _KEPT_RESULTS if key in results}
    auc = json.loads(last.read_text())["step_auc"] if last.is_file() else results["step_auc"]
    return {"seed": setup.seed, **found, "last_step_auc": auc}


def table(report: Mapping[str, Any]) -> str:
    """Return what was compared, accuracies, and the AUC of steps and weights, in Markdown."""
    seeds = ", ".join(map(str, report["seed_numbers"]))
    there = f"Seeds {seeds}: {sum(report['n_questions'])} selections on held-out questions, "
    there += f"{len(report['runs'])} of {len(ROWS)} rows complete."
    noisy = report["sources"][1:]
    header = ["row", "step AUC", *(f"weights' AUC: {source}" for source in ("all", *noisy))]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    empty = " |" * (len(header) - 2)
    lines.append(f"| {PLACE} | {np.mean(report['place_auc']):.3f} |{empty}")
    for name, runs in report["runs"].items():
        aucs = [run.get("weight_auc") for run in runs]
        columns = [aucs] + [
            [run.get("sources", {}).get(source, {}).get("auc") for run in runs] for source in noisy
        ]
        shown = [", ".join(f"{auc:.2f}" for auc in column if auc is not None) for column in columns]
        mean = np.mean([run["last_step_auc"] for run in runs])
        lines.append(f"| {label_of(name)} | {mean:.3f} | {' | '.join(shown)} |")
    return "\n\n".join([there, comparison_table(report), "\n".join(lines)])


def check(given: argparse.Namespace) -> dict[str, Any]:
    """Run what is missing, unless only a report is wanted, and return the figures.

    Raises:
        ValueError: A report is wanted, and no row is complete for all seeds.
    """
    task = TASKS[given.task]
    work = Path(given.work_dir or f"runs/{given.task}")
    model = work / "model" if given.report else write_model(gguf_file(), work / "model")
    every = Setup(work, model, work / "activations", threads=given.threads)
    setups = [
        replace(every, directory=work / f"seed-{seed}", seed=seed)
        for seed in range(given.first_seed, given.first_seed + given.seeds)
    ]
    for setup in [] if given.report else setups:
        if not (setup.directory / "data").exists():
            task.write(Path(given.data), setup.directory / "data", seed=setup.seed)
        once(setup.cold_start, run_cold_start)
        for name in given.rows:
            print(f"\nseed {setup.seed}: {name}", flush=True)
            if not is_complete(setup, name):
                train_row(setup, name)
    rows = [name for name in given.rows if all(is_complete(setup, name) for setup in setups)]
    if not rows:
        raise ValueError(
            f"expected a row that is complete for seeds {[setup.seed for setup in setups]} in "
            f"{work}, found none; run without --report, or name fewer seeds"
        )
    return {
        **report_of(setups, rows),
        "task": given.task,
        "sources": list(task.sources),
        "seed_numbers": [setup.seed for setup in setups],
        "trained_layers": every.trained,
        "cold_steps": every.cold_steps,
        "steps": every.steps,
        "aggregation": AGGREGATION,
        "machine": machine(),
        "environment": environment(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison, print the tables, and write the JSON file."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.evidence.smollm2",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", choices=list(TASKS), default="game24")
    parser.add_argument("--data", help="the file of solutions; default: data/TASK/ and its name")
    parser.add_argument("--work-dir", help="default: runs/TASK")
    parser.add_argument("--output", help="default: results/TASK.json")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--seeds", type=int, default=6, help="two of them test 40 puzzles of game24"
    )
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument(
        "--report", action="store_true", help="train nothing, report the rows that are complete"
    )
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    task = TASKS[given.task]
    given.data = given.data or f"data/{given.task}/{task.file}"
    given.output = given.output or f"results/{given.task}.json"
    if not given.report and not Path(given.data).is_file():
        parser.error(f"--data {given.data}: no such file; {task.origin}")
    check_writable("--output", Path(given.output))
    torch.set_num_threads(given.threads)
    report = check(given)
    print("\n" + table(report))
    write_json(Path(given.output), report)


if __name__ == "__main__":
    sys.exit(reported("recipes.evidence.smollm2", main))
