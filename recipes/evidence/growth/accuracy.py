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
from pathlib import Path
from typing import Any

from recipes.embedded.build import build
from recipes.options.parse import changed, resolve
from recipes.options.train import ColdStartOptions, TrainOptions
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
