"""Accuracy and time of the embedded task with an upper gradient for every N upper steps.

``python -m recipes.evidence.growth accuracy``

Each seed has its own data set and cold start, as in ``bilevel-prm compare``. The preset
``train-net`` is run in order upper-first with each N, and the preset ``baseline``, which has no
upper level. Processor seconds are those of the lower and upper steps after the first ten, with what
belongs to them, batches and log included.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bilevel import OneStep, PerExample
from prm.evaluation.metrics import roc_auc
from recipes.embedded.build import build
from recipes.options.parse import changed, resolve
from recipes.options.train import ColdStartOptions, TrainOptions
from recipes.problems.digit_reweighting import init_network, logits, make_solver
from recipes.problems.noisy_labels import (
    NoisyLabelOptions,
    batches,
    make_task,
    rows_of,
    weighting_of,
)
from recipes.run.files import write_json
from recipes.train.cold_start import run_cold_start
from recipes.train.training import run_training

_LOG_EVERY = 10
_COMMON = {"threads": 1, "device": "cpu", "progress": False}


def measured(work: Path, every: Sequence[int], seeds: int) -> list[dict[str, Any]]:
    """Return the rows of the table; complete runs in ``work`` are not repeated."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in range(seeds):
        folder = work / f"seed-{seed}"
        if not (folder / "data").exists():
            build(folder / "data", seed=seed)
        if not (folder / "cold-start" / "results.json").exists():
            _cold_start(folder, seed)
        for name in ("none", *map(str, every)):
            runs.setdefault(name, []).append(_run(folder, seed, name))
    return [{"upper_gradient_every": name, **_summary(found)} for name, found in runs.items()]


def _cold_start(folder: Path, seed: int) -> None:
    options = changed(
        resolve(ColdStartOptions, {"config": "cold-start"}),
        train_file=str(folder / "data" / "cold-start.jsonl"),
        output_dir=str(folder / "cold-start"),
        seed=seed,
        **_COMMON,
    )
    run_cold_start(options)


def _run(folder: Path, seed: int, name: str) -> dict[str, Any]:
    """Return the figures of a run, which is made unless it is complete.

    Args:
        folder: The folder of the seed.
        seed: The seed.
        name: N, or "none" for no upper level.
    """
    directory, data = folder / f"every-{name}", folder / "data"
    kept = directory / "figures.json"
    if not kept.exists():
        shutil.rmtree(directory, ignore_errors=True)  # of a run that was interrupted
        own: dict[str, Any] = {}
        if name != "none":
            own = {
                "meta_file": str(data / "meta.jsonl"),
                "order": "upper-first",
                "upper_gradient_every": int(name),
            }
        options = changed(
            resolve(TrainOptions, {"config": "baseline" if name == "none" else "train-net"}),
            train_file=str(data / "train.jsonl"),
            dev_file=None,
            test_file=str(data / "test.jsonl"),
            init_from=str(folder / "cold-start" / "model"),
            output_dir=str(directory),
            log_every=_LOG_EVERY,
            seed=seed,
            **_COMMON,
            **own,
        )
        marks: list[float] = []
        run_training(options, lambda _: marks.append(time.process_time()))
        steps = options.lower.steps - _LOG_EVERY
        write_json(kept, {"cpu_ms_per_step": 1000 * (marks[-1] - marks[0]) / steps})
    found: dict[str, Any] = json.loads(kept.read_text())
    results = json.loads((directory / "results.json").read_text())
    rows = results["rows"]
    found["accuracy"] = rows["no_selection" if name == "none" else "instance_net"]
    found["weight_auc"] = results.get("weight_auc")
    return found


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    accuracies = [run["accuracy"] for run in runs]
    spread = statistics.stdev(accuracies) / math.sqrt(len(runs)) if len(runs) > 1 else None
    return {
        "accuracy": statistics.mean(accuracies),
        "standard_error": spread,
        "cpu_ms_per_step": statistics.median(run["cpu_ms_per_step"] for run in runs),
        "runs": list(runs),
    }


def digits(every: Sequence[int], seeds: int) -> list[dict[str, Any]]:
    """Return accuracy and AUC of an Instance Table on digits with 40 % wrong labels.

    The data and settings of ``make noisy-labels``, in order upper-first; and uniform weights.
    """
    rows = []
    for name in ("none", *map(str, every)):
        runs = [_digits_run(seed, name) for seed in range(seeds)]
        aucs = [run["weight_auc"] for run in runs if run["weight_auc"] is not None]
        row = {"upper_gradient_every": name, **_summary(runs)}
        rows.append(row | {"weight_auc": statistics.mean(aucs) if aucs else None})
    return rows


def _digits_run(seed: int, name: str) -> dict[str, Any]:
    options, method = NoisyLabelOptions(), "uniform" if name == "none" else "instance_table"
    task = make_task(options, seed)
    scans, meta, test = rows_of(method, task), task.splits.meta, task.splits.test
    weighting = weighting_of(method, scans, options, seed)
    every = 1 if name == "none" else int(name)
    solver = replace(
        make_solver(weighting, options.lower_lr, options.warm_up),
        hypergradient=OneStep(PerExample(), "upper-first", upper_gradient_every=every),
    )
    network = init_network(options.hidden, torch.Generator().manual_seed(seed))
    state = solver.init(network, weighting.phi)
    upper = {"x": meta.x, "y": meta.y} if weighting.optimizer else None
    seconds = 0.0
    for batch in batches(scans, options, torch.Generator().manual_seed(seed)):
        started = time.process_time()
        state, _ = solver.step(state, [batch], upper)
        seconds += time.process_time() - started
    right = logits(state.lower_params, test.x).argmax(1) == test.true
    auc = None
    if weighting.optimizer:
        rows = torch.arange(len(scans))
        everything = {"x": scans.x, "y": scans.y, "row": rows, "step": options.steps}
        losses = torch.zeros(len(scans))
        weights = weighting.weights(state.upper_params, everything, losses)
        auc = float(roc_auc(scans.clean.numpy(), weights.detach().numpy()))
    return {
        "accuracy": float(right.double().mean()),
        "weight_auc": auc,
        "cpu_ms_per_step": 1000 * seconds / options.steps,
    }
