"""The two kinds of runs: cold start, and training with instance weights followed by evaluation."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel import BilevelProblem, BilevelSolver, StepInfo
from prm.collate import Batch
from prm.losses import step_cross_entropy
from prm.model import PRM, save_prm, step_logits
from recipes.evaluation import evaluate, report_of, step_scores_of, values_of
from recipes.objective import Objective
from recipes.options import ColdStartOptions, LowerOptions, TrainOptions
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
from recipes.train_data import TrainData, read_train_data, require
from recipes.training import train
from recipes.weight_report import final_weights, weight_report, write_weights
from weighting import DomainTable, InstanceNet, Weighting, save_weighting

_LOWER_ORDER, _UPPER_ORDER, _DRAW = 1, 2, 3  # which random stream of the run's seed


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
    objective = Objective(prm, AGGREGATIONS["mean"], "both", None)  # the upper level is not used
    solver = make_plain_solver(options, objective.problem())
    create_run_directory(directory, options)
    state = train(
        solver,
        solver.init(lower, {}),
        steps=options.steps,
        lower_batches=_lower_batches(options, data, drawn, {}),
        upper_batch=None,
        log=directory / "log.jsonl",
        log_every=options.log_every,
        title="cold start",
        progress=options.progress,
        learning_rates={"lower_lr": lower_schedule(options)},
    )
    save_prm(prm, state.lower_params, directory / "model")
    seconds = round(time.perf_counter() - started, 2)
    results = {"rows": {}, "examples": rows, "seed": options.seed, "seconds": {"total": seconds}}
    write_json(directory / "results.json", results)
    print(f"cold start on {rows} of {len(data)} examples, {seconds:.0f} s: {directory / 'model'}")
    return directory


def run_training(options: TrainOptions) -> Path:
    """Train with instance weights, evaluate, and write the whole run directory; returns it."""
    clock = _Clock()
    set_up(options)
    directory = free_directory(Path(options.output_dir), options.on_existing)
    prm, lower = load_model(options, options.freeze, options.init_from)
    data = read_train_data(prm, options)
    weighting = make_weighting(options, len(data.train), len(data.domains))
    objective = Objective(
        prm,
        AGGREGATIONS[options.aggregation],
        options.loss_target,
        weighting,
        options.features,
        options.reference_features,
    )
    solver, upper, rates = _solver(options, objective, data)
    create_run_directory(directory, options)
    reference, _ = step_scores_of(prm, lower, data.train, options)
    initial_loss = _losses(prm, lower, data.train, options)
    clock.lap("set_up")
    visits = torch.zeros(len(data.train), dtype=torch.int64)

    def count_visits(step: int, batches: Sequence[Mapping[str, Tensor]], info: StepInfo) -> None:
        for batch in batches:
            if "index" in batch:
                visits.index_add_(0, batch["index"], torch.ones_like(batch["index"]))

    extras = {"reference_probs": reference}
    if data.fixed_weights is not None:
        extras["weights"] = data.fixed_weights
    on_meta = options.lower_data == "meta"
    lower_data = data.meta if on_meta and data.meta is not None else data.train
    state = train(
        solver,
        solver.init(lower, upper),
        steps=options.steps,
        lower_batches=_lower_batches(
            options, lower_data, range(len(lower_data)), {} if on_meta else extras
        ),
        upper_batch=_upper_batch(options, data.meta) if weighting and data.meta else None,
        log=directory / "log.jsonl",
        log_every=options.log_every,
        title=_row_name(options),
        progress=options.progress,
        learning_rates=rates,
        on_step=count_visits,
    )
    clock.lap("train")
    save_prm(prm, state.lower_params, directory / "model")
    results: dict[str, Any] = {"rows": {}, "seed": options.seed}
    if weighting is not None:
        weights, raw = final_weights(
            options, objective, state.lower_params, state.upper_params, data, reference
        )
        columns = {
            "weight": weights, "raw_weight": raw, "visits": visits, "initial_loss": initial_loss
        }  # fmt: skip
        write_weights(directory / "weights.jsonl", data.train, columns)
        _save_weighting(directory / "weighting", options, weighting, state.upper_params, data)
        results |= weight_report(data.train, weights)
    results |= _evaluate_all(prm, state.lower_params, data, options, directory)
    clock.lap("evaluate")
    results["seconds"] = clock.laps
    write_json(directory / "results.json", results)
    _print_summary(results, directory)
    return directory


class _Clock:
    """Seconds per phase of a run."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._since, 2)
        self._since = now


def _row_name(options: TrainOptions) -> str:
    """The row of ``results.json`` that a run fills."""
    if options.weights_file is not None:
        return "fixed_weights"
    if options.lower_data == "meta":
        return "meta_only"
    return {
        "net": "instance_net",
        "table": "instance_table",
        "domain": "domain_table",
        "none": "no_selection",
    }[options.weighting]


def _solver(
    options: TrainOptions, objective: Objective, data: TrainData
) -> tuple[BilevelSolver, dict[str, Tensor], dict[str, Any]]:
    """The solver, the initial upper parameters, and the learning rates to log."""
    rates: dict[str, Any] = {"lower_lr": lower_schedule(options)}
    if options.lower_data == "meta":
        problem = BilevelProblem(lower_loss=objective.upper_loss, upper_loss=objective.upper_loss)
        return make_plain_solver(options, problem), {}, rates
    weighting = objective.weighting
    if weighting is None:
        return make_plain_solver(options, objective.problem()), {}, rates
    scale = time_scale(options, weighting)
    print("time scale\n" + scale.table())
    if scale.warning():
        print(f"warning: {scale.warning()}")
    schedule = upper_schedule(options, scale.upper_lr)
    rates["upper_lr"] = lambda step: schedule(
        max(0, step - options.upper_start) // options.unroll_steps
    )
    if isinstance(weighting, InstanceNet):
        upper = weighting.init(torch.Generator().manual_seed(options.seed))
    else:
        upper = weighting.init()
    return make_solver(options, objective, scale.upper_lr), upper, rates


def _stream(options: LowerOptions, stream: int) -> int:
    return options.seed * 10 + stream


def _lower_batches(
    options: LowerOptions, data: Examples, rows: Sequence[int], extras: Mapping[str, Tensor]
) -> Any:
    """Micro-batches of a step; ``extras`` are values per row of ``data`` that batches also hold."""
    order = epoch_order(len(rows), _stream(options, _LOWER_ORDER))
    per_step = options.batch_size * options.accumulation

    def micro_batch(chosen: Sequence[int]) -> Batch:
        batch = data.batch(chosen)
        steps = batch["step_mask"].shape[1]
        for name, values in extras.items():
            picked = values[list(chosen)]
            batch[name] = picked[:, :steps] if picked.dim() == 2 else picked
        return batch

    def batches(step: int) -> list[Batch]:
        chosen = [rows[place] for place in order(step * per_step, per_step)]
        size = options.batch_size
        return [micro_batch(chosen[start : start + size]) for start in range(0, per_step, size)]

    return batches


def _upper_batch(options: TrainOptions, meta: Examples) -> Any:
    """Meta batch of a step; with loss target "pairs" made of whole questions."""
    groups: dict[str, list[int]] = {}
    for row, example in enumerate(meta.examples):
        own = example.id if options.loss_target != "pairs" else str(example.group)
        groups.setdefault(own, []).append(row)
    rows = list(groups.values())
    order = epoch_order(len(rows), _stream(options, _UPPER_ORDER))
    per_step = max(1, min(options.meta_batch_size * len(rows) // len(meta), len(rows)))

    def batch(step: int) -> Batch:
        chosen = [rows[place] for place in order(step * per_step, per_step)]
        made = meta.batch([row for group in chosen for row in group])
        owners = [torch.full((len(group),), place) for place, group in enumerate(chosen)]
        return made | {"group": torch.cat(owners)}

    return batch


@torch.no_grad()
def _losses(prm: PRM, lower: Mapping[str, Tensor], data: Examples, options: TrainOptions) -> Tensor:
    """Loss of every example under the given parameters, [examples]."""
    losses = []
    for rows in torch.arange(len(data)).split(options.eval_batch_size):
        batch = data.batch(rows.tolist())
        logits = step_logits(prm, lower, batch)
        losses.append(step_cross_entropy(logits, batch["labels"], batch["step_mask"]))
    return torch.cat(losses)


def _save_weighting(
    directory: Path,
    options: TrainOptions,
    weighting: Weighting,
    params: Mapping[str, Tensor],
    data: TrainData,
) -> None:
    names: list[str] = []
    if isinstance(weighting, DomainTable):
        names = list(data.domains)
    elif not isinstance(weighting, InstanceNet):
        names = [example.id for example in data.train.examples]
    extra = {"features": list(options.features), "reference": options.reference_features}
    save_weighting(directory, weighting, params, names, extra)


def _evaluate_all(
    prm: PRM,
    lower: Mapping[str, Tensor],
    data: TrainData,
    options: TrainOptions,
    directory: Path,
) -> dict[str, Any]:
    row = _row_name(options)
    results: dict[str, Any] = {}
    for name, candidates in data.evaluations.items():
        found = evaluate(prm, lower, candidates, options)
        values = values_of(candidates, found, row)
        report = report_of(candidates, found, values)
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
