"""``bilevel-prm relabel``: write a data file with corrected step labels.

``learned`` takes the labels that a run with ``--weighting labels`` has learned. ``nait`` and
``scan`` are rules without an upper level, as baselines for them (``weighting.heuristics``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from prm.data.reader import write_jsonl
from prm.schema import DataError, StepExample
from recipes.bad_rows import report_bad_rows
from recipes.evaluation.candidates import step_scores_of
from recipes.models.loading import (
    Examples,
    Solutions,
    load_model,
    placement_of,
    read_examples,
    read_solutions,
    set_up,
)
from recipes.options.rules import check_together
from recipes.options.use import RelabelOptions
from recipes.options.values import OptionError, existing_file
from recipes.report.run_labels import read_labels
from recipes.run.files import note_unchecked, output_file
from recipes.terminal import say
from recipes.train.data import require
from recipes.train.reports.weights import step_labels
from weighting import confident_labels, tolerant_labels


@dataclass
class _Written:
    """Counts what is written: examples, labels, and how many of these were turned over."""

    examples: int = 0
    labels: int = 0
    turned: int = 0
    left_out: int = 0

    def take(self, given: StepExample, new: StepExample) -> None:
        """Count an example."""
        self.examples += 1
        for one, other in zip(given.steps, new.steps, strict=True):
            if one.label is not None and other.label is not None:
                self.labels += 1
                self.turned += (one.label - 0.5) * (other.label - 0.5) < 0


def run_relabel(options: RelabelOptions) -> None:
    """Write the examples of a file, in the project's format, with corrected labels.

    Raises:
        OptionError: There are no learned labels, or an output cannot be written so.
        DataError: A record cannot be used, or labels and steps do not belong to each other.
        OSError: The output cannot be written.
    """
    set_up(options)
    check_together(options)
    out = output_file(
        "--output",
        options.output,
        overwrite=options.overwrite,
        inputs=(options.file, options.labels if options.by == "learned" else None),
        streams=False,
    ).path
    assert out is not None
    data, relabelled = _RULES[options.by](options)
    written = _Written()

    def examples() -> Iterator[StepExample]:
        for example, labels in zip(data.examples, relabelled, strict=True):
            if labels is None:
                written.left_out += 1
                continue
            new = _with_labels(example, labels)
            written.take(example, new)
            yield new

    root = options.image_root
    write_jsonl(out, examples(), Path(options.file).parent if root is None else Path(root))
    report_bad_rows([data.bad], out, say)
    left = f", {written.left_out:,} left out" if written.left_out else ""
    say(
        f"{out}: {written.examples:,} examples{left}; {written.turned:,} of {written.labels:,} "
        "labels were turned over"
    )


def _with_labels(example: StepExample, labels: Sequence[float]) -> StepExample:
    steps = tuple(
        replace(step, label=None if math.isnan(label) else label)
        for step, label in zip(example.steps, labels[: len(example.steps)], strict=True)
    )
    return replace(example, steps=steps)


_Relabelled = tuple[Examples | Solutions, Sequence[Sequence[float] | None]]
"""The examples, and the labels of the steps of each (NaN: none); None: it is left out."""


def _learned(options: RelabelOptions) -> _Relabelled:
    """Return the labels of a run, which must be of these examples and their labels.

    Raises:
        DataError: The run has other examples, or was given other labels.
    """
    if options.labels is None:
        raise OptionError("--by learned needs --labels, labels.jsonl of a run that learned labels")
    path = existing_file(options.labels)
    known = read_labels(path)
    note_unchecked(path)
    data = read_solutions(options, options.file)
    found: list[Sequence[float] | None] = []
    for facts, line in zip(data.facts, data.lines, strict=True):
        labels = known.get(facts.id)
        given = [None if label is None else _float32(label) for label in facts.labels]
        if labels is None or [None if y is None else _float32(y) for y in labels[0]] != given:
            raise DataError(
                expected=f"an example of the run, with the labels that {path.name} says were given",
                found=f"{facts.id!r}, which is not among them" if labels is None else "others",
                file=options.file,
                line=line,
                field="id" if labels is None else "steps[].label",
                remedy="give the file that the run trained on",
            )
        found.append([math.nan if label is None else label for label in labels[1]])
    return data, found


def _float32(label: float) -> float:
    return float(torch.tensor(label, dtype=torch.float32))


def _nait(options: RelabelOptions) -> _Relabelled:
    """Return ``confident_labels`` by the step scores of ``--model``."""
    prm, params = load_model(options, placement=placement_of(options.placement))
    data = require(read_examples(prm, options, options.file), "labels")
    scores, _ = step_scores_of(prm, params, data, options)
    labels = step_labels(data.examples, scores.shape[1])
    return data, confident_labels(labels, scores.double(), options.threshold).tolist()


def _scan(options: RelabelOptions) -> _Relabelled:
    """Return ``tolerant_labels``, with the selection of examples that the paper's data have.

    Left out are solutions of questions on which the sampling model is less confident than
    ``--least-confidence``, and wrong solutions without a step that all completions fail after. All
    steps of a right solution are "+".

    Raises:
        DataError: A row has no confidence.
    """
    data = require(read_solutions(options, options.file), "labels")
    confidences = torch.tensor(
        [
            _confidence(example, line, options)
            for example, line in zip(data.examples, data.lines, strict=True)
        ],
        dtype=torch.float64,
    )
    shares = step_labels(data.examples, max(len(example.labels) for example in data.facts))
    usable = confidences >= options.least_confidence
    # Of examples that are left out the confidence may be 0, and does not matter.
    labels = tolerant_labels(shares, torch.where(usable, confidences, 1.0), options.tolerance)
    found: list[Sequence[float] | None] = []
    for row, facts in enumerate(data.facts):
        fails = bool((shares[row] == 0).any())
        if not usable[row] or (facts.correct is False and not fails):
            found.append(None)
        else:
            found.append((torch.ones_like(labels[row]) if facts.correct else labels[row]).tolist())
    return data, found


def _confidence(example: StepExample, line: int, options: RelabelOptions) -> float:
    value = example.extra.get(options.confidence)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and 0 <= value <= 1:  # type: ignore[operator]
        return float(value)  # type: ignore[arg-type]
    raise DataError(
        expected="the share of the sampling model's solutions of the question that are right, a "
        "number in [0, 1]",
        found=repr(value)[:80] if options.confidence in example.extra else "nothing",
        file=options.file,
        line=line,
        field=options.confidence,
        remedy="name the field that has it as --confidence",
    )


_RULES: dict[str, Callable[[RelabelOptions], _Relabelled]] = {
    "learned": _learned,
    "nait": _nait,
    "scan": _scan,
}
