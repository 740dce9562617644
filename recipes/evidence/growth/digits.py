"""Accuracy of learned weights with an upper gradient for every N upper steps, on digits.

``python -m recipes.evidence.growth digits``

On the embedded task ``bilevel-prm compare`` varies N.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from bilevel import OneStep, PerExample
from prm.evaluation.metrics import roc_auc
from recipes.problems.digit_reweighting import init_network, logits, make_solver
from recipes.problems.noisy_labels import (
    NoisyLabelOptions,
    batches,
    make_task,
    rows_of,
    weighting_of,
)


def measured(every: Sequence[int], seeds: int) -> list[dict[str, Any]]:
    """Return accuracy and AUC of an Instance Table on digits with 40 % wrong labels.

    The data and settings of ``make noisy-labels``, in order upper-first; and uniform weights.
    """
    rows = []
    for name in ("none", *map(str, every)):
        runs = [_run(seed, name) for seed in range(seeds)]
        aucs = [run["weight_auc"] for run in runs if run["weight_auc"] is not None]
        row = {"upper_gradient_every": name, **_summary(runs)}
        rows.append(row | {"weight_auc": statistics.mean(aucs) if aucs else None})
    return rows


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    accuracies = [run["accuracy"] for run in runs]
    spread = statistics.stdev(accuracies) / math.sqrt(len(runs)) if len(runs) > 1 else None
    return {
        "accuracy": statistics.mean(accuracies),
        "standard_error": spread,
        "cpu_ms_per_step": statistics.median(run["cpu_ms_per_step"] for run in runs),
        "runs": list(runs),
    }


def _run(seed: int, name: str) -> dict[str, Any]:
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
