"""The weights of a run: every example's at the end, and what they say about the label sources."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prm.evaluation.metrics import roc_auc
from prm.losses import step_cross_entropy
from prm.schema import StepExample
from recipes.evaluation.candidates import step_scores_of
from recipes.loading import Examples, Solutions
from recipes.options.train import TrainOptions
from recipes.run.files import write_text
from recipes.train.data import TrainData, lower_examples
from recipes.train.objective import Objective, State
from weighting import EXAMPLE_KEYS, Weighting, reads_model, save_weighting

_SMALLEST_DISTANCE = 2.0**-25


def step_labels(examples: Sequence[StepExample], steps: int) -> Tensor:
    """Labels of all examples, [examples, steps] float64; NaN where there is none."""
    labels = torch.full((len(examples), steps), float("nan"), dtype=torch.float64)
    for row, example in enumerate(examples):
        known = [float("nan") if step.label is None else step.label for step in example.steps]
        labels[row, : len(known)] = torch.tensor(known, dtype=torch.float64)
    return labels


def initial_losses(scores: Tensor, mask: Tensor, data: Examples) -> Tensor:
    """Loss of every example, [examples] float64, from the step scores of the initial model.

    The two-way cross-entropy in nats, without another forward pass. Where a float32 score is 1 its
    distance to 1 is lost: scores count as within [2⁻²⁵, 1 − 2⁻²⁵], so that a step loses at most
    17.3.

    Args:
        scores: Step scores p("+"), [examples, steps].
        mask: Which steps exist, [examples, steps].
        data: The examples, with their labels.
    """
    labels = step_labels(data.examples, scores.shape[1])
    logits = torch.logit(scores.double(), eps=_SMALLEST_DISTANCE)
    return step_cross_entropy(torch.stack([logits, torch.zeros_like(logits)], -1), labels, mask)


def reads_examples_alone(weighting: Weighting) -> bool:
    """Whether a weighting needs neither tokens nor a model: records can be weighed as they are."""
    return EXAMPLE_KEYS.issuperset(weighting.reads)


def example_batch(
    weighting: Weighting,
    examples: Sequence[StepExample],
    index: Mapping[str, int],
    domains: Mapping[str, int],
) -> dict[str, Tensor]:
    """What a weighting reads of a whole file, as one batch, without tokens and without a model.

    Args:
        weighting: The weighting, which reads nothing but ``EXAMPLE_KEYS``.
        examples: The examples of the file.
        index: Row of every id; read where the weighting reads ``index``.
        domains: Number of every domain; read where it reads ``domain``.
    """
    batch: dict[str, Tensor] = {}
    if "index" in weighting.reads:
        batch["index"] = torch.tensor([index[example.id] for example in examples])
    if "domain" in weighting.reads:
        batch["domain"] = torch.tensor([domains[str(example.domain)] for example in examples])
    counts = torch.tensor([len(example.steps) for example in examples])
    if "labels" in weighting.reads:
        batch["labels"] = step_labels(examples, int(counts.max())).float()
    if "step_mask" in weighting.reads:
        batch["step_mask"] = torch.arange(int(counts.max())) < counts[:, None]
    return batch


def model_batches(
    objective: Objective,
    data: Examples,
    scores: Tensor | None,
    reference: Tensor | None,
    batch_size: int,
) -> Iterator[Mapping[str, Tensor]]:
    """What a weighting reads of a file with tokens and, where it asks for them, step scores.

    Args:
        objective: The weighting, and how its features are named.
        data: The examples; where the weighting reads ``index`` or ``domain``, with rows.
        scores: Step scores under the trained model, [examples, steps]; None: none are read.
        reference: Step scores under the initial model, likewise.
        batch_size: Examples at a time.
    """
    for rows in torch.arange(len(data)).split(batch_size):
        batch = data.batch(rows.tolist())
        steps = batch["labels"].shape[1]
        if reference is not None:
            batch["reference_probs"] = reference[rows, :steps]
        outputs = {} if scores is None else {"step_probs": scores[rows, :steps]}
        yield objective.weighting_batch(batch, outputs)


def final_weights(
    options: TrainOptions,
    objective: Objective,
    state: State,
    data: TrainData,
    reference: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Weight and raw weight, [examples] each, of every lower-level example at the end.

    A weighting weighs the whole file, under the trained model (``Weighting.file_weights``). Without
    one the weights are the given ones, as given, or 1, and there are no raw weights.

    Args:
        options: Options of the run.
        objective: Its weighting.
        state: The trained parameters of both levels.
        data: The examples.
        reference: Step scores of the initial model, [examples, steps]; None without a weighting.
    """
    weighting, train = objective.weighting, data.train
    if weighting is None:
        ones = torch.ones(len(lower_examples(options, data)))
        return (ones if data.fixed_weights is None else data.fixed_weights), None
    params = {name: tensor.detach() for name, tensor in state.upper_params.items()}
    if reads_examples_alone(weighting):
        index = {example.id: row for row, example in enumerate(train.examples)}
        batch = example_batch(weighting, train.examples, index, data.domains)
        return weighting.file_weights(params, [batch])
    scores = None
    if reads_model(weighting):
        scores, _ = step_scores_of(objective.prm, state.lower_params, train, options)
    batches = model_batches(objective, train, scores, reference, options.eval_batch_size)
    return weighting.file_weights(params, batches)


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
    directory: Path, objective: Objective, params: Mapping[str, Tensor], data: TrainData
) -> None:
    """``weighting/``: what is needed to weigh examples again, the names of the rows too.

    Args:
        directory: Where to write, see ``save_weighting``.
        objective: The weighting, and how its features are named.
        params: Trained parameters of the weighting.
        data: The examples, whose ids or domains name the rows.
    """
    weighting = objective.weighting
    assert weighting is not None
    names: Sequence[str] = ()
    if weighting.row_key == "domain":
        names = list(data.domains)
    elif weighting.row_key == "index":
        names = [example.id for example in data.train.examples]
    extra: dict[str, Any] = {}
    if objective.reads_features:
        extra = {"features": list(objective.features), "reference": objective.reference}
        extra["domains"] = list(data.domains) if objective.reads_domain else []
    elif objective.reads_domain and weighting.row_key != "domain":
        extra = {"domains": list(data.domains)}
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
