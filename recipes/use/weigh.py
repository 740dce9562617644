"""``bilevel-prm weigh``: weigh the examples of a file, by a saved weighting or by a rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from prm.aggregations import AGGREGATIONS
from prm.conventions import Conventions
from prm.inputs.prompt import SYSTEM_PROMPT
from prm.models.model import PRM
from prm.schema import DataError
from recipes.bad_rows import report_bad_rows
from recipes.evaluation.candidates import step_scores_of
from recipes.method.bounded_weights import WEIGHTINGS
from recipes.method.gradients import gradient_features, read_gradient_map
from recipes.method.objective import Objective
from recipes.models.loading import (
    Data,
    Examples,
    Solutions,
    load_model,
    placement_of,
    read_examples,
    read_solutions,
    set_up,
    tokenised,
)
from recipes.options.base import OF_MODEL, flag_of
from recipes.options.rules import check_together, refuse_given
from recipes.options.use import WeighOptions
from recipes.options.values import OptionError, blaming
from recipes.run.directory import run_of
from recipes.run.files import need_output_for_lists, output_file
from recipes.terminal import say
from recipes.train.data import require
from recipes.train.reports.weights import (
    check_weighting,
    example_batch,
    model_batches,
    reads_examples_alone,
    weight_lines,
)
from recipes.use.weigh_rules import rule_weights
from weighting import Weighting, load_weighting, reads_model

_SHOWN = 5


def run_weigh(options: WeighOptions) -> None:
    """Write ``id, weight, raw_weight`` of every example, in the order of the file.

    If the weighting normalises, weights have mean 1 over the file: they compare the examples of the
    file with each other. On a run's training file they equal its ``weights.jsonl``. The weights of
    a rule are 1 and 0, and its raw weights are the scores that it ranks by.

    Raises:
        OptionError: There is no weighting, it does not read an option, it was not trained with the
            options, or the output exists already or cannot be written.
        DataError: A record cannot be used, or the weighting has no row or domain for an example.
        OSError: The output cannot be written.
    """
    set_up(options)
    check_together(options)
    output = output_file(
        "--output",
        options.output,
        overwrite=options.overwrite,
        inputs=(options.file,),
        sealed=True,
    )
    need_output_for_lists(options, output.path)
    data: Examples | Solutions
    if options.by == "weighting":
        data, weights, raw = _by_weighting(options)
    else:
        data, weights, raw = rule_weights(options)
    output.write_lines(weight_lines(data, {"weight": weights, "raw_weight": raw}))
    report_bad_rows([data.bad], output.path, say)
    low, high = float(weights.min()), float(weights.max())
    output.say(f"weights of {len(data)} examples, {low:.3f} to {high:.3f}")


@dataclass(frozen=True)
class _Saved:
    """A saved weighting, with the names that its run stored with it.

    Attributes:
        directory: The directory in which it is saved.
        weighting: The weighting.
        params: The parameters of the weighting.
        names: The names of its rows (ids or domains), empty if there are no rows.
        extra: The names of its features and domains.
    """

    directory: str
    weighting: Weighting
    params: Mapping[str, Tensor]
    names: Sequence[str]
    extra: Mapping[str, Any]

    @property
    def index(self) -> dict[str, int]:
        """The row of every id, if rows are instances."""
        return _numbered(self.names if self.weighting.row_key == "index" else ())

    @property
    def domains(self) -> dict[str, int]:
        """The index of every domain that the weighting reads, in its rows or as a feature."""
        by_row = self.weighting.row_key == "domain"
        return _numbered(self.names if by_row else self.extra.get("domains", ()))


def _numbered(names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def _by_weighting(options: WeighOptions) -> tuple[Examples | Solutions, Tensor, Tensor]:
    if options.weighting is None:
        raise OptionError("--by weighting needs --weighting, the weighting directory of a run")
    kinds = [registration.kind for registration in WEIGHTINGS.values()]
    try:
        check_weighting(Path(options.weighting))
        saved = _Saved(options.weighting, *load_weighting(options.weighting, kinds))
    except (FileNotFoundError, ValueError) as error:
        raise OptionError(f"--weighting {options.weighting}: {error}") from error
    if reads_examples_alone(saved.weighting):
        return _by_examples(options, saved)
    return _by_model(options, saved)


def _by_examples(options: WeighOptions, saved: _Saved) -> tuple[Solutions, Tensor, Tensor]:
    """Return examples, weights and raw weights by a weighting that needs no model."""
    weighting = saved.weighting
    refuse_given(
        options,
        WeighOptions.ASKS_MODEL,
        f"{{flags}}: no effect with the weighting {type(weighting).__name__}, which asks no model; "
        "leave out",
    )
    data = read_solutions(options, options.file)
    if "labels" in weighting.reads:
        data = require(data, "labels")
    data = _check_rows(options, saved, data)
    batch = example_batch(weighting, data.examples, saved.index, saved.domains)
    with blaming(f"--file {options.file}"):
        return data, *weighting.file_weights(saved.params, [batch])


def _by_model(options: WeighOptions, saved: _Saved) -> tuple[Examples, Tensor, Tensor]:
    """Return examples, weights, raw weights by a weighting of tokens or step scores."""
    weighting = saved.weighting
    features, uses_reference = _features(saved)
    prm, model_params = load_model(options, placement=placement_of(options.placement))
    _check_prompt(prm.usage, saved.directory)
    data = read_examples(prm, options, options.file)
    data = require(data, "labels")
    data = _check_rows(options, saved, data)
    domains = saved.domains
    if domains or saved.index:
        index = saved.index or data.index()
        data = data.with_rows(index=index, domains=domains or None)
    objective = Objective(
        prm, AGGREGATIONS["mean"], "both", weighting, features, uses_reference, len(domains)
    )
    scores = None
    if reads_model(weighting):
        scores, _ = step_scores_of(prm, model_params, data, options)
    reference = gradient = None
    if objective.reads_reference or objective.reads_gradient:
        start = _reference(options, saved.directory, data, prm.usage)
        if objective.reads_reference:
            reference, _ = step_scores_of(start.prm, start.params, start.data, options)
        if objective.reads_gradient:
            gradient = _gradients(options, saved.directory, objective, start)
    batches = model_batches(objective, data, scores, reference, options.eval_batch_size, gradient)
    return data, *weighting.file_weights(saved.params, batches)


def _check_prompt(usage: Conventions, directory: str) -> None:
    """Refuse a model that is asked otherwise than in the run of the net."""
    run = run_of(directory)
    differ = []
    for name in (name for name in OF_MODEL if name in run):
        then, now = run[name], getattr(usage, name)
        if now != (SYSTEM_PROMPT if name == "system_prompt" and then is None else then):
            differ.append(f"{flag_of(name)} {now} (the run: {then})")
    if differ:
        raise OptionError(
            f"{'; '.join(differ)}: the net has learned from what the model says to the run's "
            "prompt; give the same, or the model of the run"
        )


def _features(saved: _Saved) -> tuple[tuple[str, ...], bool]:
    """Return the features of a weighting, and whether it reads those of the initial model."""
    if "features" not in saved.weighting.reads:
        return (), False
    try:
        return tuple(saved.extra["features"]), bool(saved.extra["reference"])
    except KeyError as error:
        raise OptionError(
            f"--weighting {saved.directory}: config.json does not name the net's {error}, so its "
            "inputs are not known"
        ) from error


class _Reference(NamedTuple):
    """The initial model of a run: the model, its parameters, and the file as it reads it."""

    prm: PRM
    params: Mapping[str, Tensor]
    data: Examples


def _gradients(
    options: WeighOptions, directory: str, objective: Objective, start: _Reference
) -> Tensor:
    """Return the gradient features of the file under the initial model, [examples, features].

    The loss is that of the run.
    """
    try:
        known = read_gradient_map(Path(directory))
        run = run_of(directory)
        trained = {name: value for name, value in start.params.items() if name in known.scales}
        if len(trained) < len(known.scales):
            raise ValueError(
                f"expected a model with the {len(known.scales)} parameters that the run trained; "
                f"found {len(trained)} of them"
            )
        of_start = replace(
            objective,
            prm=start.prm,
            full_vocab=run.get("probability") == "vocabulary",
            lower_loss=run.get("lower_loss") or objective.lower_loss,
        )
        placement = placement_of(options.placement)
        return gradient_features(of_start, trained, start.data, placement, known)
    except ValueError as error:
        raise OptionError(f"--weighting {directory}: {error}") from error


def _reference(
    options: WeighOptions, directory: str, data: Examples, usage: Conventions
) -> _Reference:
    """Return the initial model of the run.

    It is asked as the trained model is (``usage``), as it was in training.
    """
    name = options.reference_model
    if name is None:
        run = run_of(directory)
        name = run.get("init_from") or run.get("model")
    if name is None:
        raise OptionError(
            f"--weighting {directory}: the net also reads what the initial model says, and "
            "there is no args.yaml of a run that names it; give --reference-model"
        )
    try:
        prm, params = load_model(
            replace(options, model=name),
            placement=placement_of(options.placement),
            conventions=usage,
        )
    except OptionError as error:
        raise OptionError(f"--reference-model {name}: {error}") from error
    tokens = tokenised(prm, options, data, too_long="refuse")
    if len(tokens) < len(data):
        raise OptionError(
            f"--reference-model {name}: cannot judge {len(data) - len(tokens)} solutions that "
            "--model judges; leave them out of the file"
        )
    return _Reference(prm, params, tokens)


def _check_rows(options: WeighOptions, saved: _Saved, data: Data) -> Data:
    """Refuse examples whose id or domain the weighting was not trained with; return the others.

    Raises:
        DataError: An example has no domain, or the weighting was not trained with its id or
            domain.
    """
    if saved.weighting.row_key == "index":
        _check_known(options, (example.id for example in data.facts), saved.index, "id")
    if saved.domains:
        data = require(data, "domain")
        names = (str(example.domain) for example in data.facts)
        _check_known(options, names, saved.domains, "domain")
    return data


def _check_known(
    options: WeighOptions, keys: Iterable[str], known: Mapping[str, int], what: str
) -> None:
    unknown = list(dict.fromkeys(key for key in keys if key not in known))
    if unknown:
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        raise DataError(
            expected=f"no other {what}s than the {len(known)} that the weighting was trained with",
            found=", ".join(map(repr, unknown[:_SHOWN])) + more,
            file=options.file,
            field=what,
            remedy="a table says nothing of others; train an Instance Net, without the feature "
            "domain, to weigh unseen examples",
        )
