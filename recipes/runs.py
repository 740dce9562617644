"""The two kinds of runs: cold start, and training with instance weights followed by evaluation."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel import StepInfo
from prm.collate import Batch
from prm.metrics import roc_auc
from prm.model import PRM, save_prm
from prm.schema import DataError
from recipes.evaluation import Candidates, evaluate, read_candidates, step_scores_of, summary
from recipes.objective import Objective
from recipes.options import ColdStartOptions, LowerOptions, OptionError, TrainOptions
from recipes.order import epoch_order
from recipes.problem_setup import (
    lower_schedule,
    make_plain_solver,
    make_solver,
    make_weighting,
    time_scale,
    upper_schedule,
)
from recipes.report import results_table
from recipes.run_directory import create_run_directory, free_directory, write_json, write_text
from recipes.session import AGGREGATIONS, Examples, load_model, read_examples, set_up
from recipes.training import train
from weighting import DomainTable, InstanceNet, InstanceTable, Weighting, row_index, save_weighting

_LOWER_ORDER, _UPPER_ORDER, _DRAW = 1, 2, 3  # which random stream of the run's seed
_ROW_NAMES = {
    "net": "instance_net",
    "table": "instance_table",
    "domain": "domain_table",
    "none": "no_selection",
}


def run_cold_start(options: ColdStartOptions) -> Path:
    """Teach the model the two label tokens on a random draw of the noisy training file.

    Writes ``model`` (an ordinary checkpoint), ``log.jsonl`` and ``results.json``; returns the run
    directory.
    """
    started = time.perf_counter()
    set_up(options)
    directory = free_directory(Path(options.output_dir), options.on_existing)
    prm, lower = load_model(options, options.freeze)
    data = read_examples(prm, options, options.train_file)
    require(data, "labels")
    rows = len(data) if options.draw == 0 else min(options.draw, len(data))
    drawn = epoch_order(len(data), _stream(options, _DRAW))(0, rows)
    create_run_directory(directory, options)
    lower = fit(options, prm, lower, data, drawn, directory / "log.jsonl", "cold start")
    save_prm(prm, lower, directory / "model")
    seconds = round(time.perf_counter() - started, 2)
    results = {"rows": {}, "examples": rows, "seed": options.seed, "seconds": {"total": seconds}}
    write_json(directory / "results.json", results)
    print(f"cold start on {rows} of {len(data)} examples, {seconds:.0f} s: {directory / 'model'}")
    return directory


def fit(
    options: LowerOptions,
    prm: PRM,
    lower: Mapping[str, Tensor],
    data: Examples,
    rows: Sequence[int],
    log: Path | None,
    title: str,
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """Plain supervised training on ``rows`` of ``data``; returns the trained parameters.

    Args:
        options: of the lower level.
        prm: the model.
        lower: trainable parameters to start from.
        data: examples with step labels.
        rows: which of them; visited in shuffled epochs.
        log: log file or None.
        title: what the progress bar says.
        weights: fixed weight of every row of ``data``, [len(data)]; None: all 1.
    """
    objective = Objective(prm, AGGREGATIONS[options.aggregation], "both", None)
    solver = make_plain_solver(options, objective)
    state = train(
        solver,
        solver.init(dict(lower), {}),
        steps=options.steps,
        lower_batches=_lower_batches(options, data, rows, "weights", weights),
        upper_batch=None,
        log=log,
        log_every=options.log_every,
        title=title,
        progress=options.progress,
        learning_rates={"lower_lr": lower_schedule(options)},
    )
    return state.lower_params


@dataclass(frozen=True)
class TrainData:
    """Everything a training run reads.

    Attributes:
        train: step-labelled examples, with rows in the weight table.
        meta: outcome-labelled examples of the upper level; None without an upper level.
        evaluations: candidate files by name ("dev", "test").
        domains: number of every domain of ``train``; empty if some example has none.
    """

    train: Examples
    meta: Examples | None
    evaluations: Mapping[str, Candidates]
    domains: Mapping[str, int]


def read_train_data(prm: PRM, options: TrainOptions) -> TrainData:
    """Read and check the files of a training run.

    Raises:
        OptionError: a file is missing or one set is used for two purposes.
        DataError: a record that cannot be used.
    """
    if options.weighting != "none" and options.meta_file is None:
        raise OptionError(
            f"--weighting {options.weighting} needs --meta-file (solutions with `correct`); "
            "or choose --weighting none"
        )
    if options.meta_file is not None and options.meta_file == options.test_file:
        raise OptionError(
            "--meta-file and --test-file are the same file; weights would be tuned on the test set"
        )
    plain = read_examples(prm, options, options.train_file)
    require(plain, "labels")
    names = [example.domain for example in plain.examples]
    domains = {} if None in names else {str(n): i for i, n in enumerate(dict.fromkeys(names))}
    if options.weighting == "domain" and not domains:
        raise OptionError(f"--weighting domain needs a `domain` in every row of {plain.path}")
    train_set = read_examples(
        prm,
        options,
        options.train_file,
        index=row_index([example.id for example in plain.examples]),
        domains=domains or None,
        examples=plain.examples,
    )
    meta = None
    if options.weighting != "none":
        meta = read_examples(prm, options, str(options.meta_file))
        require(meta, "correct")
    files = {"dev": options.dev_file, "test": options.test_file}
    return TrainData(
        train_set,
        meta,
        {name: read_candidates(prm, options, path) for name, path in files.items() if path},
        domains,
    )


def run_training(options: TrainOptions) -> Path:
    """Train with instance weights, evaluate, and write the whole run directory; returns it."""
    started = time.perf_counter()
    set_up(options)
    directory = free_directory(Path(options.output_dir), options.on_existing)
    prm, lower = load_model(options, options.freeze, options.init_from)
    data = read_train_data(prm, options)
    weighting = make_weighting(options, len(data.train), len(data.domains))
    reference, _ = step_scores_of(prm, lower, data.train, options)
    objective = Objective(
        prm,
        AGGREGATIONS[options.aggregation],
        options.loss_target,
        weighting,
        options.features,
        options.reference_features,
    )
    create_run_directory(directory, options)
    seconds = {"set_up": time.perf_counter() - started}
    upper: dict[str, Tensor] = {}
    rates: dict[str, Any] = {"lower_lr": lower_schedule(options)}
    if weighting is None:
        solver = make_plain_solver(options, objective)
    else:
        scale = time_scale(options, weighting)
        print("time scale\n" + scale.table())
        if scale.warning():
            print(f"warning: {scale.warning()}")
        solver = make_solver(options, objective, scale.upper_lr)
        upper = _initial_weights(weighting, options.seed)
        schedule = upper_schedule(options, scale.upper_lr)
        rates["upper_lr"] = lambda step: schedule(
            max(0, step - options.upper_start) // options.unroll_steps
        )
    visits = torch.zeros(len(data.train), dtype=torch.int64)

    def count_visits(step: int, batches: Sequence[Batch], info: StepInfo) -> None:
        for batch in batches:
            visits.index_add_(0, batch["index"], torch.ones_like(batch["index"]))

    state = train(
        solver,
        solver.init(lower, upper),
        steps=options.steps,
        lower_batches=_lower_batches(
            options, data.train, range(len(data.train)), "reference_probs", reference
        ),
        upper_batch=None if data.meta is None else _upper_batch(options, data.meta),
        log=directory / "log.jsonl",
        log_every=options.log_every,
        title=_ROW_NAMES[options.weighting],
        progress=options.progress,
        learning_rates=rates,
        on_step=count_visits,
    )
    seconds["train"] = time.perf_counter() - started - sum(seconds.values())
    save_prm(prm, state.lower_params, directory / "model")
    results: dict[str, Any] = {"rows": {}, "seed": options.seed}
    if weighting is not None:
        weights, raw = final_weights(
            options, objective, state.lower_params, state.upper_params, data, reference
        )
        names = list(data.domains) if isinstance(weighting, DomainTable) else data.train.examples
        ids = [n if isinstance(n, str) else n.id for n in names]
        save_weighting(
            directory / "weighting",
            weighting,
            state.upper_params,
            () if isinstance(weighting, InstanceNet) else ids,
            {"features": list(options.features), "reference": options.reference_features},
        )
        _write_weights(directory / "weights.jsonl", data.train, weights, raw, visits)
        results |= weight_report(data.train, weights)
    results |= _evaluate_all(prm, state.lower_params, data, options, directory)
    seconds["evaluate"] = time.perf_counter() - started - sum(seconds.values())
    results["seconds"] = {name: round(value, 2) for name, value in seconds.items()}
    write_json(directory / "results.json", results)
    _print_summary(results, directory)
    return directory


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
    by_source = {}
    for source in dict.fromkeys(sources.tolist()):
        kept = clean | (sources == source)
        entry = {"mean_weight": round(float(values[sources == source].mean()), 4)}
        if not clean[sources == source].all():
            entry["auc"] = round(float(roc_auc(clean[kept], values[kept])), 4)
        by_source[source] = entry
    both = clean.any() and not clean.all()
    auc = {"weight_auc": round(float(roc_auc(clean, values)), 4)} if both else {}
    return {**auc, "sources": by_source}


def require(data: Examples, what: str) -> None:
    """Refuse examples without ``labels`` or without ``correct``.

    Raises:
        DataError: naming the first such line.
    """
    for line, example in enumerate(data.examples, start=1):
        if what == "correct" and example.correct is None:
            raise DataError(
                file=data.path,
                line=line,
                field="correct",
                expected="true or false",
                found="nothing",
                remedy="meta examples must say whether the solution's answer is right",
            )
        if what == "labels" and all(step.label is None for step in example.steps):
            raise DataError(
                file=data.path,
                line=line,
                field="steps[].label",
                expected="at least one labelled step",
                found="none",
                remedy="label a step or remove the example",
            )


def _stream(options: LowerOptions, stream: int) -> int:
    return options.seed * 10 + stream


def _initial_weights(weighting: Weighting, seed: int) -> dict[str, Tensor]:
    if isinstance(weighting, InstanceNet):
        return weighting.init(torch.Generator().manual_seed(seed))
    return weighting.init()


def _lower_batches(
    options: LowerOptions,
    data: Examples,
    rows: Sequence[int],
    extra_name: str,
    extra: Tensor | None,
) -> Any:
    order = epoch_order(len(rows), _stream(options, _LOWER_ORDER))
    per_step = options.batch_size * options.accumulation

    def batches(step: int) -> list[Batch]:
        chosen = [rows[place] for place in order(step * per_step, per_step)]
        made = []
        for start in range(0, per_step, options.batch_size):
            part = chosen[start : start + options.batch_size]
            batch = data.batch(part)
            if extra is not None:
                # Per-step extras are cut to the batch's longest solution.
                values = extra[part]
                batch[extra_name] = (
                    values[:, : batch["labels"].shape[1]] if values.dim() == 2 else values
                )
            made.append(batch)
        return made

    return batches


def _upper_batch(options: TrainOptions, meta: Examples) -> Any:
    order = epoch_order(len(meta), _stream(options, _UPPER_ORDER))
    size = min(options.meta_batch_size, len(meta))

    def batch(step: int) -> Batch:
        return meta.batch(order(step * size, size))

    return batch


def _write_weights(
    path: Path, data: Examples, weights: Tensor, raw: Tensor, visits: Tensor
) -> None:
    lines = [
        json.dumps(
            {"id": example.id, "weight": weight, "raw_weight": raw_weight, "visits": seen},
            ensure_ascii=False,
        )
        for example, weight, raw_weight, seen in zip(
            data.examples, weights.tolist(), raw.tolist(), visits.tolist(), strict=True
        )
    ]
    write_text(path, "\n".join(lines) + "\n")


def _evaluate_all(
    prm: PRM,
    lower: Mapping[str, Tensor],
    data: TrainData,
    options: TrainOptions,
    directory: Path,
) -> dict[str, Any]:
    row = _ROW_NAMES[options.weighting]
    results: dict[str, Any] = {}
    for name, candidates in data.evaluations.items():
        found = evaluate(prm, lower, candidates, options)
        size = max(map(len, candidates.groups))
        values = {
            "pass@1": candidates.pass_at_one,
            "self_consistency": candidates.majority,
            row: found.selected,
            f"pass@{size}": candidates.pass_at_n,
        }
        report = {
            **summary(values),
            "n_questions": len(candidates.groups),
            "step_auc": found.step_auc,
            "step_macro_f1": found.step_macro_f1,
        }
        results |= report if name == "test" else {name: report}
        lines = [
            json.dumps(
                {"question": str(candidates.data.examples[rows[0]].group)}
                | {key: float(value[place]) for key, value in values.items()}
            )
            for place, rows in enumerate(candidates.groups)
        ]
        write_text(directory / f"{name}_questions.jsonl", "\n".join(lines) + "\n")
    return results


def _print_summary(results: Mapping[str, Any], directory: Path) -> None:
    if results["rows"]:
        print(f"\n{results['n_questions']} test questions")
        print(results_table(results))
        if results["step_auc"] is not None:
            print(f"step AUC {results['step_auc']:.3f}, macro F1 {results['step_macro_f1']:.3f}")
    if "weight_auc" in results:
        print(f"\nAUC of the weights, right against wrong labels: {results['weight_auc']:.3f}")
        for source, entry in results["sources"].items():
            auc = f", AUC {entry['auc']:.3f}" if "auc" in entry else ""
            print(f"  {source:<12}mean weight {entry['mean_weight']:.2f}{auc}")
    parts = ", ".join(f"{name.replace('_', ' ')} {s:.0f}" for name, s in results["seconds"].items())
    print(f"\nseconds: {parts}\nrun directory: {directory}")
