"""The training file of a row whose labels a rule corrects by the scores of its cold start."""

from __future__ import annotations

import json
import math
from pathlib import Path

from recipes.evaluation.candidates import step_scores_of
from recipes.models.loading import load_model, placement_of, read_examples, set_up
from recipes.options.base import PlacementOptions
from recipes.options.use import RelabelOptions
from recipes.run.files import write_text
from recipes.train.reports.weights import step_labels
from weighting import confident_labels


def write_nait(file: Path, output: Path, model: Path, threads: int) -> None:
    """Write a file of solutions with the labels of NAIT (``weighting.confident_labels``).

    Args:
        file: The file, in the project's format, with a label for every step.
        output: The file to write, beside it because of the paths of pictures.
        model: The model whose step scores correct the labels.
        threads: CPU threads of torch.
    """
    options = RelabelOptions(
        by="nait",
        model=str(model),
        file=str(file),
        output=str(output),
        threads=threads,
        placement=PlacementOptions(device="cpu"),
    )
    set_up(options)
    prm, params = load_model(options, placement=placement_of(options.placement))
    data = read_examples(prm, options, options.file)
    scores, _ = step_scores_of(prm, params, data, options)
    given = step_labels(data.examples, scores.shape[1])
    labels = confident_labels(given, scores.double(), options.threshold)
    lines = []
    for text, found in zip(file.read_text().splitlines(), labels.tolist(), strict=True):
        row = json.loads(text)
        for step, label in zip(row["steps"], found, strict=False):
            step["label"] = None if math.isnan(label) else label
        lines.append(json.dumps(row, ensure_ascii=False))
    write_text(output, "\n".join(lines) + "\n")
