"""The two kinds of runs: cold start, and training with instance weights followed by evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import BilevelProblem, BilevelSolver
from prm.inputs.collate import Batch
from prm.models.model import PRM, save_prm
from recipes.evaluation.candidates import step_scores_of
from recipes.options.rules import check_together
from recipes.options.train import ColdStartOptions, TrainOptions
from recipes.run.checkpoints import Progress
from recipes.run.directory import write_json
from recipes.run.resume import open_run
from recipes.session import AGGREGATIONS, load_model, read_examples, set_up
from recipes.train.batches import (
    Draw,
    ahead,
    cold_start_rows,
    count_visits,
    lower_draw,
    lower_meta_draw,
    meta_batch,
    per_step,
    train_batch,
    upper_draw,
)
from recipes.train.data import TrainData, lower_examples, read_train_data, require
from recipes.train.loop import StepLogging, Training, train
from recipes.train.make_solver import (
    lower_schedule,
    make_plain_solver,
    make_solver,
    make_weighting,
    time_scale,
    upper_schedule,
)
from recipes.train.objective import Objective
from recipes.train.results import evaluate_all, print_summary, print_troubles, row_name
from recipes.train.weight_report import (
    final_weights,
    initial_losses,
    weight_report,
    write_weighting,
    write_weights,
)
from weighting import InstanceNet, Weighting, mean_one_over


def run_cold_start(options: ColdStartOptions) -> Path:
    """Teach the model the two label tokens on a random draw of the noisy training file.

    Writes ``model`` (an ordinary checkpoint), ``log.jsonl`` and ``results.json``; returns the run
    directory.
    """
    started = time.perf_counter()
    check_together(options)
    set_up(options)
    prm, lower = load_model(options, options.freeze)
    data = read_examples(prm, options, options.train_file)
    require(data, "labels")
    drawn = cold_start_rows(options, len(data))
    objective = Objective(  # the upper level is not used
        prm,
        AGGREGATIONS["mean"],
        "both",
        None,
        full_vocab=options.probability == "vocabulary",
        lower_loss=options.lower_loss,
    )
    solver = make_plain_solver(options, objective.problem())
    batch = train_batch(lower_draw(options, drawn), data)
    with open_run(options, prm.model, solver.init(lower, {})) as run:
        training = Training(
            solver,
            steps=options.steps,
            lower_batches=ahead(
                per_step(batch, options.accumulation), options.steps, options.workers
            ),
            title="cold start",
            on_trouble=options.on_trouble,
        )
        rates = {"lower_lr": lower_schedule(options)}
        end = train(run, training, StepLogging(options.log_every, rates, options.progress))
        directory = run.directory
        with run.keeping(end):
            save_prm(prm, end.state.lower_params, directory / "model")
            seconds = round(time.perf_counter() - started, 2)
            rows = len(drawn)
            results = {"rows": {}, "examples": rows, "seed": options.seed}
            results |= {"troubles": dict(end.seen.counts), "seconds": {"total": seconds}}
            write_json(directory / "results.json", results)
    print(f"cold start on {rows} of {len(data)} examples, {seconds:.0f} s: {directory / 'model'}")
    print_troubles(end.seen.counts)
    return directory


def run_training(options: TrainOptions) -> Path:
    """Train with instance weights, evaluate, and write the whole run directory; returns it."""
    clock = _Clock()
    check_together(options)
    set_up(options)
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
        len(data.domains),
        full_vocab=options.probability == "vocabulary",
        lower_loss=options.lower_loss,
        normalise_given=options.normalise == "batch",
    )
    solver, upper, rates = _solver(options, objective, data)
    with open_run(options, prm.model, solver.init(lower, upper)) as run:
        initial = None if weighting is None else _initial_scores(prm, lower, data, options)
        clock.lap("set_up")
        draw, lower_batch = _lower_level(options, data, weighting, initial)
        upper_batch = None
        if weighting is not None and data.meta is not None:
            upper_batch = ahead(
                meta_batch(upper_draw(options, data.meta), data.meta),
                options.steps,
                options.workers,
                every=options.unroll_steps,
            )
        training = Training(
            solver,
            steps=options.steps,
            lower_batches=ahead(
                per_step(lower_batch, options.accumulation), options.steps, options.workers
            ),
            title=row_name(options),
            on_trouble=options.on_trouble,
            upper_batch=upper_batch,
            weighting=weighting,
        )
        end = train(run, training, StepLogging(options.log_every, rates, options.progress))
        clock.lap("train")
        with run.keeping(end):
            results = _finish(options, objective, end, data, initial, draw, run.directory, clock)
    print_summary(results, run.directory)
    return run.directory


def _finish(
    options: TrainOptions,
    objective: Objective,
    end: Progress,
    data: TrainData,
    initial: _Initial | None,
    draw: Draw,
    directory: Path,
    clock: _Clock,
) -> dict[str, Any]:
    """Write the model, the weights and the results of a trained run; returns the results."""
    prm, weighting, state = objective.prm, objective.weighting, end.state
    save_prm(prm, state.lower_params, directory / "model")
    results: dict[str, Any] = {"rows": {}, "seed": options.seed}
    results["troubles"] = dict(end.seen.counts)
    trained = lower_examples(options, data)
    weights, raw = final_weights(
        options,
        objective,
        state.lower_params,
        state.upper_params,
        data,
        None if initial is None else initial.scores,
    )
    visits = count_visits(draw, options.steps * options.accumulation, len(trained))
    columns = {"weight": weights, "raw_weight": raw, "visits": visits}
    if initial is not None:
        columns["initial_loss"] = initial.losses
    write_weights(directory / "weights.jsonl", trained, columns)
    if weighting is not None:
        write_weighting(directory / "weighting", options, weighting, state.upper_params, data)
        results |= weight_report(trained, weights)
    results |= evaluate_all(prm, state.lower_params, data, options, directory)
    clock.lap("evaluate")
    results["seconds"] = clock.laps
    write_json(directory / "results.json", results)
    return results


class _Clock:
    """Seconds per phase of a run."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._since, 2)
        self._since = now


class _Initial(NamedTuple):
    """What the initial model says of the training set: step scores [examples, steps], losses."""

    scores: Tensor
    losses: Tensor


def _initial_scores(
    prm: PRM, lower: Mapping[str, Tensor], data: TrainData, options: TrainOptions
) -> _Initial:
    scores, mask = step_scores_of(prm, lower, data.train, options)
    return _Initial(scores, initial_losses(scores, mask, data.train))


def _lower_level(
    options: TrainOptions, data: TrainData, weighting: Weighting | None, initial: _Initial | None
) -> tuple[Draw, Callable[[int], Batch]]:
    """Which rows the lower level draws, and its numbered micro-batches."""
    examples = lower_examples(options, data)
    if options.lower_data == "meta":
        draw = lower_meta_draw(options, examples)
        return draw, meta_batch(draw, examples)
    columns = {}
    if initial is not None and isinstance(weighting, InstanceNet) and options.reference_features:
        columns["reference_probs"] = initial.scores
    if data.fixed_weights is not None:
        given = data.fixed_weights
        columns["weights"] = mean_one_over(given, given) if options.normalise == "table" else given
    draw = lower_draw(options, range(len(examples)))
    return draw, train_batch(draw, examples, columns)


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
