"""``bilevel-prm weigh``: what a saved weighting, or a rule, says of the examples of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prm.aggregations import AGGREGATIONS
from prm.schema import DataError
from recipes.evaluation.candidates import step_scores_of
from recipes.loading import Examples, Solutions, load_model, read_examples, read_solutions, set_up
from recipes.options.rules import check_together, refuse_given
from recipes.options.use import WeighOptions
from recipes.options.values import OptionError
from recipes.train.data import require
from recipes.train.objective import Objective
from recipes.train.weight_report import net_weights, write_weights
from recipes.use.model_run import prompt_differences, run_of
from recipes.use.weigh_rules import rule_weights
from weighting import DomainTable, InstanceNet, InstanceTable, load_weighting

_SHOWN = 5


def run_weigh(options: WeighOptions) -> Path:
    """Write ``id, weight, raw_weight`` of every example, in the order of the file.

    Weights have mean 1 over the file where the weighting normalises: they say how the examples of
    a file compare with each other, and equal a run's ``weights.jsonl`` on its training file. A
    rule's weights are 1 and 0, its raw weights the scores that it ranks by.

    Raises:
        OptionError: no weighting there; options that it does not read, or that it was not trained
            with; examples whose row or domain it does not have.
        DataError: a record that cannot be used.
    """
    set_up(options)
    check_together(options)
    output = Path(options.output)
    if output.is_dir():
        raise OptionError(f"--output {output}: is a directory; name a file")
    data: Examples | Solutions
    if options.by == "weighting":
        data, weights, raw = _by_weighting(options)
    else:
        data, weights, raw = rule_weights(options)
    write_weights(output, data, {"weight": weights, "raw_weight": raw})
    low, high = float(weights.min()), float(weights.max())
    print(f"{output}: weights of {len(data)} examples, {low:.3f} to {high:.3f}")
    return output


def _by_weighting(options: WeighOptions) -> tuple[Examples | Solutions, Tensor, Tensor]:
    if options.weighting is None:
        raise OptionError("--by weighting needs --weighting, the weighting directory of a run")
    try:
        weighting, params, names, extra = load_weighting(options.weighting)
    except (FileNotFoundError, ValueError) as error:
        raise OptionError(f"--weighting {options.weighting}: {error}") from error
    if isinstance(weighting, InstanceNet):
        return _by_net(options, options.weighting, weighting, params, extra)
    return _by_table(options, weighting, params, names)


def _by_table(
    options: WeighOptions,
    table: InstanceTable | DomainTable,
    params: dict[str, Tensor],
    names: Sequence[str],
) -> tuple[Solutions, Tensor, Tensor]:
    """Examples, weights and raw weights by the rows of a table."""
    refuse_given(
        options,
        WeighOptions.ASKS_MODEL,
        f"{{flags}}: no effect with a {type(table).__name__}, which asks no model; leave out",
    )
    data = read_solutions(options, options.file)
    if isinstance(table, InstanceTable):
        rows = _rows(options, [example.id for example in data.examples], names, "id")
        return data, table.all_weights(params)[rows], table.raw_weights(params)[rows]
    require(data, "domain")
    rows = _rows(options, [str(example.domain) for example in data.examples], names, "domain")
    weights = table.all_weights(params)[rows]
    return data, weights / weights.mean(), table.raw_weights(params)[rows]


def _by_net(
    options: WeighOptions,
    directory: str,
    net: InstanceNet,
    params: Mapping[str, Tensor],
    extra: Mapping[str, Any],
) -> tuple[Examples, Tensor, Tensor]:
    """Examples, weights and raw weights by a net on the features that its config names."""
    differ = prompt_differences(options, directory)
    if differ:
        raise OptionError(
            f"{'; '.join(differ)}: the net has learned from what the model says to the run's "
            "prompt; give the same"
        )
    try:
        features, uses_reference = tuple(extra["features"]), bool(extra["reference"])
    except KeyError as error:
        raise OptionError(
            f"--weighting {directory}: config.json does not name the net's {error}, so its "
            "inputs are not known"
        ) from error
    domains = {name: place for place, name in enumerate(extra.get("domains", ()))}
    prm, model_params = load_model(options)
    data = read_examples(prm, options, options.file)
    require(data, "labels")
    if domains:
        require(data, "domain")
        _rows(options, [str(e.domain) for e in data.examples], list(domains), "domain")
        data = data.with_rows(
            index={example.id: row for row, example in enumerate(data.examples)}, domains=domains
        )
    objective = Objective(
        prm, AGGREGATIONS["mean"], "both", net, features, uses_reference, len(domains)
    )
    scores, _ = step_scores_of(prm, model_params, data, options)
    reference = _reference_scores(options, directory) if uses_reference else None
    weights, raw = net_weights(objective, params, data, scores, reference, options.eval_batch_size)
    return data, weights, raw


def _reference_scores(options: WeighOptions, directory: str) -> Tensor:
    """Step scores under the model that the run started from, [examples, steps]."""
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
        prm, params = load_model(replace(options, model=name))
    except OptionError as error:
        raise OptionError(f"--reference-model {name}: {error}") from error
    scores, _ = step_scores_of(prm, params, read_examples(prm, options, options.file), options)
    return scores


def _rows(options: WeighOptions, keys: Sequence[str], names: Sequence[str], what: str) -> Tensor:
    """Row of every key among the names of a weighting.

    Raises:
        DataError: keys that have no row.
    """
    index = {name: row for row, name in enumerate(names)}
    unseen = list(dict.fromkeys(key for key in keys if key not in index))
    if unseen:
        more = f" and {len(unseen) - _SHOWN} more" if len(unseen) > _SHOWN else ""
        raise DataError(
            expected=f"no other {what}s than the {len(names)} that the weighting was trained with",
            found=", ".join(map(repr, unseen[:_SHOWN])) + more,
            file=options.file,
            field=what,
            remedy="a table says nothing of others; train an Instance Net, without the feature "
            "domain, to weigh unseen examples",
        )
    return torch.tensor([index[key] for key in keys])
