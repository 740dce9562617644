"""The weights of a run: those of every example at the end, and their means by label source."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prm.data.store.examples import facts
from prm.data.store.outline import Facts
from prm.digests import check_digest, write_digest
from prm.evaluation.metrics import rank_correlation, roc_auc
from prm.files import write_lines
from prm.losses import step_cross_entropy
from prm.schema import StepExample
from recipes.evaluation.candidates import step_scores_of
from recipes.method.gradients import GRADIENT_FILE, write_gradient_map
from recipes.method.objective import Objective, State
from recipes.models.loading import Examples, Solutions
from recipes.options.train import TrainOptions
from recipes.run.files import note_unchecked
from recipes.train.data import TrainData, lower_examples
from weighting import EXAMPLE_KEYS, Weighting, reads_model, save_weighting

_SAVED = ("config.json", "ids.json", "params.safetensors")
"""What ``save_weighting`` writes."""
_SMALLEST_DISTANCE = 2.0**-25


def step_labels(examples: Sequence[StepExample], steps: int) -> Tensor:
    """Return the labels of all examples, [examples, steps] float64, NaN without a label."""
    labels = np.full((len(examples), steps), float("nan"))
    for row, example in enumerate(facts(examples)):
        known = [float("nan") if label is None else label for label in example.labels]
        labels[row, : len(known)] = known
    return torch.from_numpy(labels)


def initial_losses(scores: Tensor, mask: Tensor, data: Examples) -> Tensor:
    """Return the loss of every example, [examples] float64, from the initial model's scores.

    It is the two-way cross-entropy in nats, and needs no other forward pass. A float32 score close
    to 1 is rounded to 1, so scores are clamped to [2⁻²⁵, 1 − 2⁻²⁵], and the loss of a step is at
    most 17.3.

    Args:
        scores: The step scores p("+"), [examples, steps].
        mask: Whether a step exists, [examples, steps].
        data: The examples, with their labels.
    """
    labels = step_labels(data.examples, scores.shape[1])
    logits = torch.logit(scores.double(), eps=_SMALLEST_DISTANCE)
    return step_cross_entropy(torch.stack([logits, torch.zeros_like(logits)], -1), labels, mask)


def reads_examples_alone(weighting: Weighting) -> bool:
    """Return whether a weighting reads records alone, without tokens and without a model."""
    return EXAMPLE_KEYS.issuperset(weighting.reads)


def example_batch(
    weighting: Weighting,
    examples: Sequence[StepExample],
    index: Mapping[str, int],
    domains: Mapping[str, int],
) -> dict[str, Tensor]:
    """Return what a weighting reads of a whole file as one batch, without tokens or a model.

    Args:
        weighting: The weighting, which reads ``EXAMPLE_KEYS`` only.
        examples: The examples of the file.
        index: The row of every id, for a weighting that reads ``index``.
        domains: The index of every domain, for a weighting that reads ``domain``.
    """
    batch: dict[str, Tensor] = {}
    if "index" in weighting.reads:
        batch["index"] = torch.tensor([index[example.id] for example in facts(examples)])
    if "domain" in weighting.reads:
        rows = [domains[str(example.domain)] for example in facts(examples)]
        batch["domain"] = torch.tensor(rows)
    counts = torch.tensor([len(example.labels) for example in facts(examples)])
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
    gradient: Tensor | None = None,
) -> Iterator[Mapping[str, Tensor]]:
    """Yield what a weighting reads of a file with tokens, and with step scores if it needs them.

    Args:
        objective: The weighting and the names of its features.
        data: The examples, with rows if the weighting reads ``index`` or ``domain``.
        scores: The step scores of the trained model, [examples, steps], or None if none are read.
        reference: The step scores of the initial model, [examples, steps], or None.
        batch_size: The number of examples in a batch.
        gradient: The gradient features, [examples, features], or None.
    """
    for rows in torch.arange(len(data)).split(batch_size):
        batch = data.batch(rows.tolist())
        steps = batch["labels"].shape[1]
        if reference is not None:
            batch["reference_probs"] = reference[rows, :steps]
        if gradient is not None:
            batch["gradient"] = gradient[rows]
        outputs = {} if scores is None else {"step_probs": scores[rows, :steps]}
        yield objective.weighting_batch(batch, outputs)


def final_weights(
    options: TrainOptions,
    objective: Objective,
    state: State,
    data: TrainData,
    reference: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Return weight and raw weight of every lower-level example at the end, [examples] each.

    A weighting weighs the whole file with the trained model (``Weighting.file_weights``). Without
    one the weights are those of the weights file, unchanged, or 1, and there are no raw weights.

    Args:
        options: The options of the run.
        objective: The losses of both levels, with the weighting.
        state: The trained parameters of both levels.
        data: The examples.
        reference: The step scores of the initial model, [examples, steps], or None.
    """
    weighting, train = objective.weighting, data.train
    if weighting is None:
        ones = torch.ones(len(lower_examples(options, data)))
        return (ones if data.fixed_weights is None else data.fixed_weights), None
    # The scores and the examples of a whole file are in the memory of the host.
    params = {name: tensor.detach().cpu() for name, tensor in state.upper_params.items()}
    if reads_examples_alone(weighting):
        batch = example_batch(weighting, train.examples, train.index(), data.domains)
        return weighting.file_weights(params, [batch])
    scores = None
    if reads_model(weighting):
        scores, _ = step_scores_of(objective.prm, state.lower_params, train, options)
    gradient = None if data.gradients is None else data.gradients.features
    batches = model_batches(objective, train, scores, reference, options.eval_batch_size, gradient)
    return weighting.file_weights(params, batches)


def write_weights(
    path: Path, data: Examples | Solutions, columns: Mapping[str, Tensor | None]
) -> None:
    """Write ``weights.jsonl`` with its digest beside it; see ``weight_lines``."""
    write_lines(path, weight_lines(data, columns))
    write_digest(path)


def weight_lines(data: Examples | Solutions, columns: Mapping[str, Tensor | None]) -> Iterator[str]:
    """Yield ``weights.jsonl``: an example on each line, with its id and a value per column."""
    for row, example in enumerate(data.facts):
        values = {
            n: None if column is None else column[row].item() for n, column in columns.items()
        }
        yield json.dumps({"id": example.id} | values, ensure_ascii=False) + "\n"


def write_weighting(
    directory: Path, objective: Objective, params: Mapping[str, Tensor], data: TrainData
) -> None:
    """Write ``weighting/``: the weighting with the names of its rows, to weigh other files.

    The digest of each file is beside it (``prm.digests``).

    Args:
        directory: The directory to write; see ``save_weighting``.
        objective: The weighting and the names of its features.
        params: The trained parameters of the weighting.
        data: The examples, whose ids or domains name the rows.
    """
    weighting = objective.weighting
    assert weighting is not None
    names: Sequence[str] = ()
    if weighting.row_key == "domain":
        names = list(data.domains)
    elif weighting.row_key == "index":
        names = [example.id for example in data.train.facts]
    extra: dict[str, Any] = {}
    if objective.reads_features:
        extra = {"features": list(objective.features), "reference": objective.reference}
        extra["domains"] = list(data.domains) if objective.reads_domain else []
    elif objective.reads_domain and weighting.row_key != "domain":
        extra = {"domains": list(data.domains)}
    save_weighting(directory, weighting, {n: p.cpu() for n, p in params.items()}, names, extra)
    for name in _SAVED:
        write_digest(directory / name)
    if data.gradients is not None:
        write_gradient_map(directory, data.gradients.map)


def check_weighting(directory: Path) -> None:
    """Compare the files of a saved weighting with their digests; a note says if there are none.

    Raises:
        DataError: A file is not as ``write_weighting`` wrote it; the error names it.
    """
    for name in _SAVED:
        check_digest(directory / name)
    if (directory / GRADIENT_FILE).exists():
        check_digest(directory / GRADIENT_FILE)
    if all((directory / name).is_file() for name in _SAVED):
        note_unchecked(directory / _SAVED[-1])


def label_correlation(data: Examples, weights: Tensor) -> float | None:
    """Return the rank correlation of the weights with the share of "+" among an example's labels.

    Close to 1 or -1 it says that the labels alone explain the weights: the examples labelled "+"
    throughout, say, are weighted up, whether they are right or not. None if all weights or all
    shares are equal.
    """
    shares = np.array([_share_of_plus(example) for example in facts(data.examples)])
    known = ~np.isnan(shares)
    values = weights.double().numpy()[known]
    if len(np.unique(values)) < 2 or len(np.unique(shares[known])) < 2:
        return None
    return round(rank_correlation(values, shares[known]), 4)


def _share_of_plus(example: Facts) -> float:
    labels = [label for label in example.labels if label is not None]
    return sum(labels) / len(labels) if labels else float("nan")


def weight_report(data: Examples, weights: Tensor) -> dict[str, Any]:
    """Return the weights by label source, if the data name the sources (evaluation only).

    ``weight_auc`` is the probability that an example without wrong labels has a larger weight than
    one with wrong labels. Per source, only its own examples with wrong labels are compared.
    """
    found = []
    for example in data.examples:
        if not ("wrong_labels" in example.extra and "source" in example.extra):
            return {}
        found.append((example.extra["wrong_labels"] == 0, str(example.extra["source"])))
    clean = np.array([is_clean for is_clean, _ in found])
    sources = np.array([source for _, source in found])
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
