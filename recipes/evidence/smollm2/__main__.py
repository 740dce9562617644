"""Real pretrained weights, trained and used on a CPU.

Run by ``python -m recipes.evidence.smollm2 --data FILE``.

SmolLM2-135M-Instruct (``recipes.evidence.smollm2.weights``) is turned into a process reward model
of the Game of 24 (``recipes.evidence.smollm2.game24``) by the project's own commands: cold start,
the same steps again without and with Instance Net, scores of the test candidates by each. The table
sets best-of-N beside the majority vote and beside a judge that looks at the place of a step only.
The top layers are trained, the others frozen, and steps are few: this shows that the whole path
works on real weights, not what a long training gives.

What is finished in ``--work-dir`` is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from prm.aggregations import AGGREGATIONS
from prm.evaluation.metrics import paired_interval, roc_auc
from prm.names import AggregationName
from recipes.evaluation.candidates import (
    Candidates,
    interval,
    judged_steps,
    read_scored_candidates,
    solution_scores_of,
)
from recipes.evidence.smollm2.game24 import FILE, Sizes, write_parts
from recipes.evidence.smollm2.position import auc_by_position, position_scores
from recipes.evidence.smollm2.weights import gguf_file, write_model
from recipes.models.loading import read_solutions
from recipes.options.base import LoaderOptions
from recipes.options.parse import cold_start_options, to_yaml, train_options
from recipes.options.train import ColdStartOptions, LowerOptions, TrainOptions
from recipes.options.use import ScoreOptions
from recipes.run.errors import reported
from recipes.run.files import check_writable, write_json
from recipes.run.provenance import environment, machine
from recipes.train.cold_start import run_cold_start
from recipes.train.training import run_training
from recipes.use.score import run_score
from recipes.use.scores_file import scores_for

LAYERS = 30
_SYSTEM = "judge each step of the solution"
_HOW: AggregationName = "mean"


def options_of_runs(
    work: Path, model: Path, given: argparse.Namespace
) -> tuple[ColdStartOptions, TrainOptions, TrainOptions]:
    """Return the options of the three runs: cold start, No Selection and Instance Net."""
    trained = LAYERS - given.layers
    common: dict[str, Any] = {
        "model": str(model),
        "system_prompt": _SYSTEM,
        "threads": given.threads,
        "seed": given.seed,
        "train_file": str(work / "data" / "train.jsonl"),
        "freeze": ("embed_tokens", *(f"layers.{number}" for number in range(trained))),
        "batch_size": 8,
        "log_every": 4,
        "progress": False,
    }
    cold = cold_start_options(
        **common,
        output_dir=str(work / "cold-start"),
        draw=0,
        steps=given.cold_steps,
        lower_lr=given.lower_lr,
    )
    del common["model"]
    second: dict[str, Any] = {
        **common,
        "init_from": str(work / "cold-start" / "model"),
        "steps": given.steps,
        "lower_lr": given.lower_lr,
    }
    plain = train_options(**second, output_dir=str(work / "no-selection"), weighting="none")
    net = train_options(
        **second,
        output_dir=str(work / "instance-net"),
        meta_file=str(work / "data" / "meta.jsonl"),
        weighting="net",
        reference_features=False,
        loss_target="pairs",
        meta_batch_size=8,
        upper_start=2,
        eval_batch_size=8,
    )
    return cold, plain, net


def once(options: Any, run: Callable[[Any], Path]) -> None:
    """Run, unless the directory holds the finished run of the same options.

    Raises:
        FileExistsError: The directory holds a run with other options.
    """
    directory = Path(options.output_dir)
    if (directory / "results.json").is_file():
        there = yaml.safe_load((directory / "args.yaml").read_text(encoding="utf-8"))
        asked = yaml.safe_load(to_yaml(options))
        given = {name for name, value in asked.items() if value is not None}  # else the model's
        if any(there[name] != asked[name] for name in there.keys() & given):
            raise FileExistsError(
                f"{directory} holds a run of other options; remove it or name another --work-dir"
            )
        return
    run(options)


def seconds_of(run: Path) -> float:
    """Return the recorded duration of a run in seconds."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    return float(round(sum(results["seconds"].values()), 1))


def scores_of(model: Path, work: Path, name: str, threads: int) -> list[Tensor]:
    """Return the step scores [steps] of every test candidate by ``model``."""
    data, output = work / "data" / "test.jsonl", work / f"scores-{name}.jsonl"
    run_score(
        ScoreOptions(
            model=str(model),
            system_prompt=_SYSTEM,
            threads=threads,
            file=str(data),
            output=str(output),
            eval_batch_size=8,
        )
    )
    index = read_solutions(LoaderOptions(), str(data)).index()
    scores = dict(scores_for(output, index, data))
    return [torch.tensor(scores[row].step_scores) for row in range(len(index))]


def figures(candidates: Candidates, judges: Mapping[str, Sequence[Tensor]]) -> list[dict[str, Any]]:
    """Return a row per selector with accuracy and interval and, for a judge, the steps' AUC."""
    majority = np.nan_to_num(candidates.majority)  # without any answer a vote is not right
    size = max(map(len, candidates.groups))
    rows = [
        _row("pass@1 (random candidate)", candidates.pass_at_one, majority),
        _row("majority vote", majority, majority),
    ]
    for name, scores in judges.items():
        selected = candidates.best(solution_scores_of(scores, AGGREGATIONS[_HOW]))
        labels, predictions = judged_steps(candidates, scores)
        rows.append(
            {
                **_row(name, selected, majority),
                "step_auc": float(roc_auc(labels, predictions)),
                "step_auc_same_place": auc_by_position(candidates.data.examples, scores),
            }
        )
    return [*rows, _row(f"pass@{size} (oracle)", candidates.pass_at_n, majority)]


def _row(name: str, values: np.ndarray, baseline: np.ndarray) -> dict[str, Any]:
    return {
        "name": name,
        "accuracy": float(values.mean()),
        "ci95": list(interval(values)),
        "minus_majority_ci95": list(paired_interval(values, baseline)),
    }


def table(figures: Mapping[str, Any]) -> str:
    """Return the rows in Markdown."""
    lines = [
        "| row | best of N | 95 % interval | AUC of steps | AUC within a place |",
        "|---|---|---|---|---|",
    ]
    for row in figures["rows"]:
        low, high = row["ci95"]
        aucs = [row.get(name) for name in ("step_auc", "step_auc_same_place")]
        shown = " | ".join("" if auc is None else f"{auc:.3f}" for auc in aucs)
        lines.append(
            f"| {row['name']} | {row['accuracy']:.3f} | [{low:.3f}, {high:.3f}] | {shown} |"
        )
    return "\n".join(lines)


def check(given: argparse.Namespace) -> dict[str, Any]:
    """Run the missing parts, and return the figures."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(given.threads)
    work = Path(given.work_dir)
    counts = write_parts(Path(given.data), work / "data", Sizes(), given.seed)
    model = write_model(gguf_file(), work / "model")
    cold, plain, net = options_of_runs(work, model, given)
    runs: dict[str, LowerOptions] = {"cold start": cold, "No Selection": plain, "Instance Net": net}
    for options in runs.values():
        once(options, run_cold_start if options is cold else run_training)
    test = read_solutions(LoaderOptions(), str(work / "data" / "test.jsonl")).examples
    train = read_solutions(LoaderOptions(), cold.train_file).examples
    judges: dict[str, list[Tensor]] = {"place of the step only": position_scores(train, test)}
    models = {name: Path(options.output_dir) / "model" for name, options in runs.items()}
    for name, path in {"SmolLM2 as it comes": model, **models}.items():
        file = name.lower().replace(" ", "-")
        judges[f"PRM: {name}"] = scores_of(path, work, file, given.threads)
    candidates = read_scored_candidates(LoaderOptions(), str(work / "data" / "test.jsonl"))
    return {
        "rows": figures(candidates, judges),
        "n_questions": len(candidates.groups),
        "examples": counts,
        "trained_layers": given.layers,
        "cold_steps": given.cold_steps,
        "steps": given.steps,
        "batch_size": cold.lower.batch_size,
        "lower_lr": given.lower_lr,
        "aggregation": _HOW,
        "seed": given.seed,
        "seconds": {name: seconds_of(Path(options.output_dir)) for name, options in runs.items()},
        "machine": machine(),
        "environment": environment(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the check, print the table, and write the JSON file."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.evidence.smollm2",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data",
        default=f"data/game24/{FILE}",
        help=f"{FILE} of the Game of 24 (format game24 of prm/data/formats/candidates.py)",
    )
    parser.add_argument("--work-dir", default="runs/smollm2")
    parser.add_argument("--output", default="results/smollm2.json")
    parser.add_argument("--cold-steps", type=int, default=24, help="steps of the cold start")
    parser.add_argument("--steps", type=int, default=8, help="steps of each run after it")
    parser.add_argument("--layers", type=int, default=8, help="how many top layers are trained")
    parser.add_argument("--lower-lr", type=float, default=2e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if not Path(given.data).is_file():
        parser.error(
            f"--data {given.data}: no such file; "
            "python -m recipes.evidence.smollm2.label --help says how to make it of what is "
            "published"
        )
    check_writable("--output", Path(given.output))
    figures = check(given)
    print(table(figures))
    write_json(Path(given.output), figures)


if __name__ == "__main__":
    sys.exit(reported("recipes.evidence.smollm2", main))
