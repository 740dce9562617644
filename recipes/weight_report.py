"""The weights at the end of a run: every example's, and what they say about the label sources."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prm.metrics import roc_auc
from recipes.evaluation import step_scores_of
from recipes.objective import Objective
from recipes.options import TrainOptions
from recipes.run_directory import write_text
from recipes.session import Examples
from recipes.train_data import TrainData
from weighting import DomainTable, InstanceNet, InstanceTable


def final_weights(
    options: TrainOptions,
    objective: Objective,
    lower: Mapping[str, Tensor],
    upper: Mapping[str, Tensor],
    data: TrainData,
    reference: Tensor,
) -> tuple[Tensor, Tensor]:
    """Weight and raw weight of every training example at the end, mean 1 over the examples.

    Instance Net is asked once for each example under the trained model and centred over all of
    them instead of over a batch.
    """
    weighting, examples = objective.weighting, data.train
    params = {name: tensor.detach() for name, tensor in upper.items()}
    if isinstance(weighting, InstanceTable):
        return weighting.all_weights(params), weighting.raw_weights(params)
    if isinstance(weighting, DomainTable):
        rows = torch.tensor([data.domains[str(example.domain)] for example in examples.examples])
        weights = weighting.all_weights(params)[rows]
        return weights / weights.mean(), weighting.raw_weights(params)[rows]
    assert isinstance(weighting, InstanceNet)
    scores, _ = step_scores_of(objective.prm, lower, examples, options)
    raws = []
    for rows in torch.arange(len(examples)).split(options.eval_batch_size):
        batch = examples.batch(rows.tolist())
        steps = batch["labels"].shape[1]
        batch["reference_probs"] = reference[rows, :steps]
        inputs, known = objective.net_inputs(batch, {"step_probs": scores[rows, :steps]})
        raws.append(weighting.raw_weights(params, inputs, known))
    raw = torch.cat(raws)
    centred = raw - raw.mean() + weighting.bound.raw(weighting.prior) if weighting.centre else raw
    weights = weighting.bound(centred)
    return (weights / weights.mean() if weighting.normalise else weights), raw


def write_weights(path: Path, data: Examples, columns: Mapping[str, Tensor]) -> None:
    """``weights.jsonl``: id and one value per column, an example a line."""
    values = {name: column.tolist() for name, column in columns.items()}
    lines = [
        json.dumps(
            {"id": example.id} | {name: column[row] for name, column in values.items()},
            ensure_ascii=False,
        )
        for row, example in enumerate(data.examples)
    ]
    write_text(path, "\n".join(lines) + "\n")


def weight_report(data: Examples, weights: Tensor) -> dict[str, Any]:
    """How weights treat the sources, if the data says who labelled what (evaluation only).

    ``weight_auc`` is the probability that an example without wrong labels weighs more than one with
    some; per source, the examples with wrong labels are those of that source.
    """
    extras = [example.extra for example in data.examples]
    if not all("wrong_labels" in extra and "source" in extra for extra in extras):
        return {}
    clean = np.array([extra["wrong_labels"] == 0 for extra in extras])
    sources = np.array([str(extra["source"]) for extra in extras])
    values = weights.numpy()
    by_source: dict[str, dict[str, float]] = {}
    for source in dict.fromkeys(sources.tolist()):
        kept = clean | (sources == source)
        entry = {"mean_weight": round(float(values[sources == source].mean()), 4)}
        if clean[kept].any() and not clean[kept].all():
            entry["auc"] = round(float(roc_auc(clean[kept], values[kept])), 4)
        by_source[source] = entry
    report: dict[str, Any] = {"sources": by_source}
    if clean.any() and not clean.all():
        report["weight_auc"] = round(float(roc_auc(clean, values)), 4)
    return report
