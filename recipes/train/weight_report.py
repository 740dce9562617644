"""The weights of a run: every example's at the end, and what they say about the label sources."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prm.evaluation.metrics import roc_auc
from prm.losses import step_cross_entropy
from recipes.evaluation.candidates import step_scores_of
from recipes.loading import Examples, Solutions
from recipes.options.train import TrainOptions
from recipes.run.files import write_text
from recipes.train.data import TrainData, lower_examples
from recipes.train.objective import Objective
from weighting import DomainTable, InstanceNet, InstanceTable, Weighting, save_weighting

_SMALLEST_DISTANCE = 2.0**-25


def initial_losses(scores: Tensor, mask: Tensor, data: Examples) -> Tensor:
    """Loss of every example, [examples] float64, from the step scores of the initial model.

    The two-way cross-entropy, without another forward pass. Where a float32 score is 1 its
    distance to 1 is lost: scores count as within [2⁻²⁵, 1 − 2⁻²⁵], so that a step loses at most
    17.3.

    Args:
        scores: p("+") of every step, [examples, steps].
        mask: which steps exist, [examples, steps].
        data: the examples, with their labels.
    """
    labels = torch.full(scores.shape, float("nan"), dtype=torch.float64)
    for row, example in enumerate(data.examples):
        known = [float("nan") if step.label is None else step.label for step in example.steps]
        labels[row, : len(known)] = torch.tensor(known, dtype=torch.float64)
    logits = torch.logit(scores.double(), eps=_SMALLEST_DISTANCE)
    return step_cross_entropy(torch.stack([logits, torch.zeros_like(logits)], -1), labels, mask)


def final_weights(
    options: TrainOptions,
    objective: Objective,
    lower: Mapping[str, Tensor],
    upper: Mapping[str, Tensor],
    data: TrainData,
    reference: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Weight and raw weight of every lower-level example at the end, mean 1 over the examples.

    Instance Net is asked once for each example under the trained model and centred over all of
    them instead of over a batch. Without a weighting the weights are the given ones, as given, or
    1, and there are no raw weights.

    Args:
        options: of the run.
        objective: with the weighting.
        lower: trained parameters of the model.
        upper: those of the weighting.
        data: the examples.
        reference: step scores of the initial model, [examples, steps]; Instance Net only.
    """
    weighting, examples = objective.weighting, data.train
    if weighting is None:
        ones = torch.ones(len(lower_examples(options, data)))
        return (ones if data.fixed_weights is None else data.fixed_weights), None
    params = {name: tensor.detach() for name, tensor in upper.items()}
    if isinstance(weighting, InstanceTable):
        return weighting.all_weights(params), weighting.raw_weights(params)
    if isinstance(weighting, DomainTable):
        rows = torch.tensor([data.domains[str(example.domain)] for example in examples.examples])
        weights = weighting.all_weights(params)[rows]
        return weights / weights.mean(), weighting.raw_weights(params)[rows]
    scores, _ = step_scores_of(objective.prm, lower, examples, options)
    return net_weights(objective, params, examples, scores, reference, options.eval_batch_size)


def net_weights(
    objective: Objective,
    params: Mapping[str, Tensor],
    data: Examples,
    scores: Tensor,
    reference: Tensor | None,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """Weight and raw weight, [examples] each, that an Instance Net gives the examples of a file.

    As in training, but centred and normalised over all of ``data`` instead of over a batch: what a
    weight says is how an example compares with the others of its file.

    Args:
        objective: with the net and the names of its features.
        params: of the net.
        data: the examples.
        scores: their step scores under the trained model, [examples, steps].
        reference: under the initial model, likewise; None for a net that does not read them.
        batch_size: examples at a time.
    """
    net = objective.weighting
    assert isinstance(net, InstanceNet)
    raws = []
    for rows in torch.arange(len(data)).split(batch_size):
        batch = data.batch(rows.tolist())
        steps = batch["labels"].shape[1]
        if reference is not None:
            batch["reference_probs"] = reference[rows, :steps]
        inputs, known = objective.net_inputs(batch, {"step_probs": scores[rows, :steps]})
        raws.append(net.raw_weights(dict(params), inputs, known))
    raw = torch.cat(raws)
    weights = net.bound(raw - raw.mean() + net.bound.raw(net.prior) if net.centre else raw)
    return (weights / weights.mean() if net.normalise else weights), raw


def write_weights(
    path: Path, data: Examples | Solutions, columns: Mapping[str, Tensor | None]
) -> None:
    """``weights.jsonl``: id and one value per column, an example a line; a column of None: null."""
    values = {
        name: [None] * len(data) if column is None else column.tolist()
        for name, column in columns.items()
    }
    lines = [
        json.dumps(
            {"id": example.id} | {name: column[row] for name, column in values.items()},
            ensure_ascii=False,
        )
        for row, example in enumerate(data.examples)
    ]
    write_text(path, "\n".join(lines) + "\n")


def write_weighting(
    directory: Path,
    options: TrainOptions,
    weighting: Weighting,
    params: Mapping[str, Tensor],
    data: TrainData,
) -> None:
    """``weighting/``: what is needed to weigh examples again, the names of a table's rows too."""
    names: list[str] = []
    if isinstance(weighting, DomainTable):
        names = list(data.domains)
    elif not isinstance(weighting, InstanceNet):
        names = [example.id for example in data.train.examples]
    extra: dict[str, Any] = {}
    if isinstance(weighting, InstanceNet):
        extra = {
            "features": list(options.weighting.features),
            "reference": options.weighting.reference_features,
        }
        extra["domains"] = list(data.domains) if "domain" in options.weighting.features else []
    save_weighting(directory, weighting, params, names, extra)


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
