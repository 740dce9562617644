"""The data of a training run, read and checked before training starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from prm.data.bad_rows import BadRows
from prm.data.json_rows import json_rows
from prm.data.questions import Questions
from prm.data.record_fields import Location
from prm.data.store.outline import Facts
from prm.digests import check_digest
from prm.models.model import PRM
from prm.schema import DataError
from recipes.bad_rows import report_bad_rows, skipped_path
from recipes.evaluation.candidates import Candidates, read_candidates
from recipes.evaluation.leaks import find_leak, refuse_leak
from recipes.method.bounded_weights import WEIGHTINGS
from recipes.method.gradients import Gradients
from recipes.models.loading import Data, Examples, Fault, Solutions, read_examples, usable
from recipes.options.train import LowerOptions, TrainOptions
from recipes.options.values import OptionError, resume_point
from recipes.run.files import note_unchecked
from recipes.terminal import say
from recipes.train.batches import mixed_questions

_MOST = float(torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class TrainData:
    """The data of a training run.

    Attributes:
        train: The step-labelled examples, with their rows in the weight table.
        meta: The outcome-labelled examples, None if they are not needed.
        evaluations: The files of candidates by name ("dev", "test").
        domains: The index of every domain of ``train``, empty if an example has no domain.
        fixed_weights: The weight of every row of ``train`` from a weights file, [train], or None.
        gradients: The gradient features of ``train``, None if no weighting reads them.
    """

    train: Examples
    meta: Examples | None
    evaluations: Mapping[str, Candidates]
    domains: Mapping[str, int]
    fixed_weights: Tensor | None
    gradients: Gradients | None = None

    @property
    def pictures(self) -> dict[str, Iterator[Path]]:
        """The pictures of the files that are trained on, by the name of the option."""
        meta = {} if self.meta is None else {"meta_file": self.meta.pictures}
        return {"train_file": self.train.pictures, **meta}

    @property
    def bad(self) -> dict[str, BadRows]:
        """What was left out of every file, by the name of its set."""
        read: dict[str, Examples | Solutions] = {"train": self.train}
        if self.meta is not None:
            read["meta"] = self.meta
        read |= {name: candidates.data for name, candidates in self.evaluations.items()}
        return {name: data.bad for name, data in read.items()}


def read_train_data(prm: PRM, options: TrainOptions) -> TrainData:
    """Read and check the files of a training run.

    Raises:
        OptionError: A file is missing, or the meta set, or the dev set by which the model is
            chosen, shares questions with the test set and the run is not marked as a sanity check.
        DataError: A record cannot be used, or no question has a pair to compare.
    """
    plain = read_examples(prm, options, options.train_file)
    plain = require(plain, "labels")
    if _weighs_by_domain(options):
        plain = require(plain, "domain")
    ids = plain.index()
    names = dict.fromkeys(example.domain for example in plain.facts)
    domains = {} if None in names else {str(name): row for row, name in enumerate(names)}
    meta = None
    if options.data.meta_file is not None:
        # A wrong solution may owe its outcome to a step that would be cut off.
        meta = read_examples(prm, options, options.data.meta_file, too_long="refuse")
        meta = require(meta, "correct")
        if options.loss_target == "pairs":
            meta = require(meta, "group")
            _require_pairs(meta)
    evaluations = {
        name: read_candidates(prm, options, path)
        for name, path in (("dev", options.data.dev_file), ("test", options.data.test_file))
        if path
    }
    chosen_by = evaluations["dev"].data if options.data.keep_best else None
    for flag, tuned in (("--meta-file", meta), ("--keep-best: --dev-file", chosen_by)):
        if tuned is not None and "test" in evaluations:
            test = evaluations["test"].data
            refuse_leak(
                find_leak(tuned.examples, test.examples, tuned.path, test.path),
                f"{flag} {tuned.path}",
                f"--test-file {test.path}",
                sanity_check=options.data.sanity_check,
            )
    weights = options.weighting.weights_file
    return TrainData(
        train=plain.with_rows(index=ids, domains=domains or None),
        meta=meta,
        evaluations=evaluations,
        domains=domains,
        fixed_weights=_read_weights(weights, ids) if weights else None,
    )


def _require_pairs(meta: Data) -> None:
    """Say how many questions of the meta set have pairs of solutions to compare.

    Raises:
        DataError: None has, or a group holds solutions of several questions.
    """
    questions = Questions()
    first: dict[str, tuple[int, int]] = {}
    for example, line in zip(meta.examples, meta.lines, strict=True):
        question = questions.key(example)
        before, where = first.setdefault(str(example.group), (question, line))
        if question != before:
            raise DataError(
                expected="solutions of one question in a group, which --loss-target pairs compares",
                found=f"the group {example.group!r} with another question than on line {where}",
                file=meta.path,
                line=line,
                field="group",
                remedy="give every question a group of its own, or use --loss-target both",
            )
    mixed, groups = mixed_questions(meta.facts)
    distinct = len({question for question, _ in first.values()})
    of, remedy = f"{groups:,} questions", "sample more solutions of each question"
    if distinct < groups:
        of = f"{groups:,} groups, which have {distinct:,} different questions"
        remedy = "give all solutions of a question one group, since pairs are of one group"
    if not mixed:
        raise DataError(
            expected="questions with both a right and a wrong solution, which --loss-target pairs "
            "compares",
            found=f"none among {of} with {len(meta):,} solutions",
            file=meta.path,
            remedy=f"{remedy}, or use --loss-target both",
        )
    if len(mixed) < groups or distinct < groups:
        say(
            f"{meta.path}: {len(mixed):,} of {of}{',' * (distinct < groups)} have right and wrong "
            "solutions; --loss-target pairs uses these alone"
        )


def refuse_other_bad_rows(options: LowerOptions, bad: Mapping[str, BadRows]) -> None:
    """Refuse to resume a run with other rows to train on than it began with.

    Raises:
        OptionError: Other rows are left out than the lists in the run directory name.
    """
    if options.run.resume is None:
        return
    directory, _ = resume_point(options.run.resume)
    if not any((directory / "checkpoints").glob("step-*")):
        return  # it starts again from the beginning
    for name in ("train", "meta"):
        if name in bad:
            earlier = _left_out(skipped_path(directory / name))
            now = [(row.line, row.field, row.id) for row in bad[name].left_out]
            if earlier != now:
                raise OptionError(
                    f"--resume {directory}: of {bad[name].path} other rows are left out than when "
                    f"the run began ({len(now):,} now, {len(earlier):,} then); make the images "
                    "that it names as they were"
                )


def keep_bad_rows(directory: Path, bad: Mapping[str, BadRows]) -> None:
    """List what was left out of each file (train, meta, ...) in the run directory, and say so.

    So are solutions of which the first steps alone are used.
    """
    for name, one in bad.items():
        report_bad_rows([one], directory / name, say)


def _left_out(path: Path) -> list[tuple[Any, Any, Any]]:
    if not path.is_file():
        return []
    rows = [row for _, row in json_rows(path) if isinstance(row, dict)]
    return [(row.get("line"), row.get("field"), row.get("id")) for row in rows]


def _weighs_by_domain(options: TrainOptions) -> bool:
    if options.weighting.kind == "none":
        return False
    reads = WEIGHTINGS[options.weighting.kind].kind.reads
    return "domain" in reads or ("features" in reads and "domain" in options.weighting.features)


def lower_examples(options: TrainOptions, data: TrainData) -> Examples:
    """Return the training set, or the meta set with ``lower_data`` "meta"."""
    if options.weighting.lower_data == "meta":
        assert data.meta is not None
        return data.meta
    return data.train


class _Need(NamedTuple):
    """A field that the data need for some purpose, and the fault of an example without it."""

    has: Callable[[Facts], bool]
    fault: Fault


_NEEDS: Mapping[str, _Need] = {
    "labels": _Need(
        lambda example: example.labelled,
        Fault(
            field="steps[].label",
            expected="at least one labelled step",
            found="none",
            remedy="label a step or remove the example",
        ),
    ),
    "correct": _Need(
        lambda example: example.correct is not None,
        Fault(
            field="correct",
            expected="true or false",
            found="nothing",
            remedy="meta examples must say whether the solution's answer is right",
        ),
    ),
    "group": _Need(
        lambda example: example.group is not None,
        Fault(
            field="group",
            expected="the name of the question",
            found="nothing",
            remedy='loss_target "pairs" compares solutions of one question; name it, or use "both"',
        ),
    ),
    "domain": _Need(
        lambda example: example.domain is not None,
        Fault(
            field="domain",
            expected="a name",
            found="nothing",
            remedy="--weighting domain and the feature domain need one: name the example's, or use "
            "another weighting or other features",
        ),
    ),
}


def require(data: Data, what: Literal["labels", "correct", "group", "domain"]) -> Data:
    """Refuse examples without ``labels``, ``correct``, ``group`` or ``domain``, or leave them out.

    Raises:
        DataError: An example lacks the field. The error names the first such line.
    """
    need = _NEEDS[what]
    return usable(data, lambda example: None if need.has(example) else need.fault)


def _read_weights(path: str, ids: Mapping[str, int]) -> Tensor:
    file = Path(path)
    if not file.is_file():
        raise OptionError(f"--weights-file {path}: no such file")
    check_digest(file)
    weights = torch.full((len(ids),), math.nan, dtype=torch.float64)
    for line, entry in json_rows(file):
        if isinstance(entry, DataError):
            raise entry
        location = Location(file.parent, file, line)
        remedy = "use the weights.jsonl of a run on the same training file"
        if not isinstance(entry, dict):
            location.refuse(None, '{"id": ..., "weight": a number}', entry, remedy)
        name, weight = entry.get("id"), entry.get("weight")
        row = ids.get(name) if isinstance(name, str) else None
        if row is None:
            location.refuse("id", "an id of the training file", name, remedy)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or abs(weight) > _MOST:
            location.refuse("weight", "a number", weight, remedy)
        if not weights[row].isnan():
            location.refuse("id", "an id that no other line has", name, remedy)
        weights[row] = float(weight)
    if count := int(weights.isnan().sum()):
        first = int(weights.isnan().nonzero()[0])
        missing = next(name for name, row in ids.items() if row == first)
        raise OptionError(
            f"--weights-file {path}: no weight for {count} of {len(ids)} training "
            f"examples, for example {missing!r}"
        )
    note_unchecked(file)
    return weights.float()
