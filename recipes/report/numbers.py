"""What a report shows of a run, read from its directory: no model is loaded, nothing is computed.

Every file but ``args.yaml`` may be missing: of a run that is not complete, or that an older version
wrote. What is not there is None or empty, and the page says why.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prm.schema import DataError
from recipes.evaluation.table import NAMES, label_of
from recipes.options.values import OptionError
from recipes.report.run_files import data_file, lines_of, run_options
from recipes.report.run_labels import StepLabels, run_labels
from recipes.report.run_weights import RunWeights, read_run_weights
from recipes.report.shown_examples import ShownExample, shown_examples
from recipes.run.files import EXTREMES
from recipes.run.show import json_object, run_state

_SHOWN_OPTIONS = (
    *("weighting", "bound", "normalise", "hypergradient", "route", "steps", "batch_size"),
    *("lower_lr", "upper_lr", "seed", "model", "init_from", "train_file", "meta_file", "test_file"),
)


@dataclass(frozen=True)
class ResultRow:
    """Accuracy of one selector: the mean over questions, and its 95 % interval."""

    name: str
    mean: float
    low: float
    high: float

    @property
    def label(self) -> str:
        """Its name in tables."""
        return label_of(self.name)


@dataclass(frozen=True)
class FileResults:
    """The results on one file of candidates.

    Attributes:
        file: "test" or "dev".
        questions: The number of questions.
        rows: The selectors.
        best_of_k: The accuracy of the best of k candidates, k from 1; empty if not recorded.
        pass_at_k: Whether one of k is right (oracle), likewise.
        step_auc: The AUC of step scores against step labels, None if these do not allow one.
        step_macro_f1: The macro F1, likewise.
    """

    file: str
    questions: int
    rows: tuple[ResultRow, ...]
    best_of_k: tuple[float, ...]
    pass_at_k: tuple[float, ...]
    step_auc: float | None
    step_macro_f1: float | None


@dataclass(frozen=True)
class Series:
    """A figure of the log: the steps of its lines, and its values there."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class RunNumbers:
    """All that a report shows of a run.

    Attributes:
        name: What the run is called in the report: its directory, shortened.
        directory: Its directory.
        state: "complete", "at work" or "stopped".
        steps: The steps that are logged, and those of the whole run.
        options: The options that tell runs apart.
        method: The name of the model's row in the results, None without results.
        files: The results, the test set first.
        kept: The step of the model, if the development set was scored during training.
        weights: The weights, or why there are none.
        labels: The given and the learned labels by id; none if labels were not learned.
        examples: The examples of highest and lowest weight, or why none are shown.
        log: The figures of the log, by name.
        troubles: The number of troubles of each kind.
        signs: The signs that the method goes astray.
        seconds: The seconds of each part of the run.
        profile: The parts of a step, if steps were profiled (``recipes.profiling``).
        facts: Figures on the weights as ``results.json`` has them: their AUC, the correlation.
    """

    name: str
    directory: str
    state: str
    steps: tuple[int, int]
    options: Mapping[str, Any]
    method: str | None
    files: tuple[FileResults, ...]
    kept: int | None
    weights: RunWeights | str
    labels: Mapping[str, StepLabels]
    examples: tuple[ShownExample, ...] | str
    log: Mapping[str, Series]
    troubles: Mapping[str, int]
    signs: Mapping[str, str]
    seconds: Mapping[str, float]
    profile: Mapping[str, Mapping[str, float]]
    facts: Mapping[str, float]


def read_run(directory: Path, name: str, data: str | None = None) -> RunNumbers:
    """Read a run.

    Args:
        directory: The run directory.
        name: What the run is called in the report.
        data: The file that it trained on, if it is not where the args.yaml says.

    Raises:
        OptionError: There is no such run of ``train``.
        DataError: A file is not as the run wrote it.
    """
    args = run_options(directory)
    state = run_state(directory)
    if state.kind != "train":
        raise OptionError(f"{directory}: is a run of {state.kind}; reports are of runs of train")
    results = json_object(directory / "results.json") or {}
    weights = _weights(directory, args, data)
    labels = run_labels(directory)
    log = lines_of(directory / "log.jsonl")
    known = [key for key in results.get("rows", {}) if key in NAMES or "_sanity" in key]
    own = [key for key in known if key not in ("pass@1", "self_consistency", "weighted_vote")]
    return RunNumbers(
        name=name,
        directory=str(directory),
        state=state.state,
        steps=(state.logged, state.steps),
        options={key: args[key] for key in _SHOWN_OPTIONS if args.get(key) is not None},
        method=own[0] if own else None,
        files=_files(results),
        kept=results.get("model_selection", {}).get("step"),
        weights=weights,
        labels=labels,
        examples=_examples(directory, args, data, weights, labels),
        log=series(log),
        troubles=results.get("troubles", {}) if results else _troubles(log),
        signs=results.get("signs", {}),
        seconds=results.get("seconds", {}),
        profile=json_object(directory / "profile" / "parts.json") or {},
        facts={
            key: results[key]
            for key in ("weight_auc", "weight_label_correlation")
            if isinstance(results.get(key), float)
        },
    )


def series(log: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Return every number of a log over the steps whose line has it; null is no number."""
    points: dict[str, list[tuple[int, float]]] = {}
    for line in log:
        step = line.get("step")
        for key, value in line.items():
            if key != "step" and isinstance(step, int) and type(value) in (int, float):
                points.setdefault(key, []).append((step, float(value)))
    return {
        key: Series(tuple(step for step, _ in own), tuple(value for _, value in own))
        for key, own in points.items()
    }


def _troubles(log: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for line in log:
        for kind, count in line.get("troubles", {}).items():
            counts[kind] = counts.get(kind, 0) + count
    return counts


def _files(results: Mapping[str, Any]) -> tuple[FileResults, ...]:
    found = []
    for file, part in (("test", results), ("dev", results.get("dev") or {})):
        if not part.get("rows"):
            continue
        nothing = (math.nan, math.nan)
        rows = [
            ResultRow(name, mean, *part.get("ci95", {}).get(name, nothing))
            for name, mean in part["rows"].items()
        ]
        found.append(
            FileResults(
                file,
                part.get("n_questions", 0),
                tuple(rows),
                tuple(part.get("best_of_k", ())),
                tuple(part.get("pass_at_k", ())),
                part.get("step_auc"),
                part.get("step_macro_f1"),
            )
        )
    return tuple(found)


def _weights(directory: Path, args: Mapping[str, Any], data: str | None) -> RunWeights | str:
    try:
        weights = read_run_weights(directory, data_file(args, data))
    except OptionError as error:
        return str(error)
    if args.get("weighting") == "none" and weights.weight.min() == weights.weight.max():
        return "the run learned no weights (--weighting none): all examples count the same"
    return weights


def _examples(
    directory: Path,
    args: Mapping[str, Any],
    data: str | None,
    weights: RunWeights | str,
    labels: Mapping[str, StepLabels],
) -> tuple[ShownExample, ...] | str:
    if isinstance(weights, str):
        return weights
    if weights.weight.min() == weights.weight.max():
        return "all weights are equal"
    file = data_file(args, data)
    if not file.path.is_file():
        return f"the data file {file.path} is not there any more; give --data"
    try:
        scores = {str(e.get("id")): e for e in lines_of(directory / EXTREMES)}
        return shown_examples(weights, file, scores, labels)
    except DataError as error:
        return str(error)


def names_of(directories: Sequence[Path]) -> list[str]:
    """Return short names that differ: the last parts of the paths, as many as it takes."""
    for parts in range(1, max((len(path.parts) for path in directories), default=0) + 1):
        names = ["/".join(path.parts[-parts:]) for path in directories]
        if len(set(names)) == len(names):
            return names
    return [json.dumps(str(path))[1:-1] for path in directories]
