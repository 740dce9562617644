"""A training run: learn the model, with or without weights, then evaluate and report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import BilevelProblem, Collective, ResidentSolver, ShardedModule
from prm.aggregations import AGGREGATIONS
from prm.inputs.collate import Batch
from prm.models.model import PRM
from prm.placement import Placement
from recipes.evaluation.beside import Beside, rows_beside
from recipes.evaluation.candidates import step_scores_of
from recipes.evaluation.kept_scores import initial_score_cache, kept_scores
from recipes.method.bounded_weights import make_weighting
from recipes.method.gradients import fit_gradients
from recipes.method.hypergradients import upper_gradient_every
from recipes.method.make_solver import (
    begin,
    logged_upper_rate,
    lower_schedule,
    make_plain_solver,
    make_solver,
    over_ranks,
    scheduled_upper_optimizer,
    upper_schedule,
)
from recipes.method.objective import Objective, Solver, State
from recipes.method.time_scale import print_time_scale, time_scale
from recipes.models.frozen import Keeping, at_boundary, cache_folder
from recipes.models.loading import filled, placement_of, set_up
from recipes.options.choices import NetOptions
from recipes.options.rules import check_together
from recipes.options.train import TrainOptions
from recipes.options.values import blaming
from recipes.ranks import ranks_here
from recipes.run.directory import check_directory
from recipes.run.errors import RunError
from recipes.run.files import LABELS, write_json
from recipes.run.identity import digest_model
from recipes.run.resume import Run, open_run
from recipes.terminal import say
from recipes.train.batches import (
    Draw,
    ahead,
    count_visits,
    lower_draw,
    lower_meta_draw,
    meta_batch,
    per_step,
    train_batch,
    upper_draw,
)
from recipes.train.data import (
    TrainData,
    keep_bad_rows,
    lower_examples,
    read_train_data,
    refuse_other_bad_rows,
)
from recipes.train.dev_evaluation import best_of, dev_evaluation, remove_kept, selection
from recipes.train.loop import StepLogging, Training, train
from recipes.train.reports.extremes import write_extremes
from recipes.train.reports.labels import label_report, learned_labels, write_labels
from recipes.train.reports.weights import (
    final_weights,
    initial_losses,
    label_correlation,
    weight_report,
    write_weighting,
    write_weights,
)
from recipes.train.results import evaluate_all, print_summary, row_name, save_trained, write_card
from recipes.train.sharding import Trained, load_trained, over_shards
from recipes.train.signs import log_lines, signs, watcher
from recipes.train.trackers import ALL_WEIGHTS, Tracking, check_trackers, tracked
from weighting import NetTravel, StepLabels, mean_one_over

_SHOWN_EXAMPLES = 64  # on which a network's travel is found


@dataclass(frozen=True)
class _Task:
    """The task of a run: options, where it computes, data, both losses, and who takes its steps."""

    options: TrainOptions
    placement: Placement
    data: TrainData
    objective: Objective
    ranks: Collective
    shards: ShardedModule | None


class _Method(NamedTuple):
    """The method of a run: the solver, the initial upper parameters, learning rates to log."""

    solver: Solver
    upper: dict[str, Tensor]
    rates: Mapping[str, Callable[[int], float]]


class _Initial(NamedTuple):
    """Step scores [examples, steps] and losses of the training set under the initial model."""

    scores: Tensor
    losses: Tensor


def run_training(options: TrainOptions, logged: Callable[[int], None] | None = None) -> Path:
    """Train with instance weights, evaluate, and write the whole run directory.

    Args:
        options: The options of the run.
        logged: A function that is called with the step after every line of the log.

    Returns:
        The run directory.
    """
    check_together(options)
    if ranks_here().rank == 0:
        check_trackers(options.run.report_to)
        check_directory(options)
    with over_shards(options):
        return _run_training(options, logged)


def _run_training(options: TrainOptions, logged: Callable[[int], None] | None) -> Path:
    clock, ranks = _Clock(), ranks_here()
    set_up(options)
    placement = placement_of(options.placement, options.activation_checkpointing)
    trained = load_trained(options, placement, options.init_from)
    options = filled(options, trained.prm.usage)
    lower = trained.lower
    prm = at_boundary(trained.prm, lower, options)
    data = read_train_data(prm, options)
    refuse_other_bad_rows(options, data.bad)
    beside = _beside(options)
    levels = [lower_examples(options, data), *([] if data.meta is None else [data.meta])]
    Keeping(prm, options, cache_folder(options, Path(options.output_dir))).check(levels)
    title = row_name(options)
    dev = dev_evaluation(options, prm, data.evaluations, title)
    objective = _objective(options, prm, data)
    if objective.reads_gradient:
        data = _with_gradients(options, objective, lower, data, placement)
    task = _Task(options, placement, data, objective, ranks, trained.shards)
    solver, upper, rates = _method(task, lower)
    start = begin(solver, prm, lower, upper)
    in_place = isinstance(solver, ResidentSolver)
    opened = open_run(
        options,
        trained.identified,
        start,
        data.pictures,
        in_place=in_place,
        shards=trained.shards,
    )
    with opened as run, tracked(run, options) as tracking:
        if dev is not None:
            with ranks.together():
                dev.check(run)
        keep_bad_rows(run.directory, data.bad)
        initial = None
        if objective.reads_reference:
            # A checkpoint that was read in place has taken the place of the initial model.
            gone = in_place and options.run.resume is not None
            first = partial(_initial_model, task, run) if gone else lambda: (prm, lower)
            initial = _initial_scores(task, run, first)
        keeping = Keeping(prm, options, cache_folder(options, run.directory))
        clock.lap("set_up")
        draw, lower_batch = _lower_level(task, initial)
        training = Training(
            solver,
            steps=options.lower.steps,
            lower_batches=placement.batches(
                keeping(
                    ahead(
                        per_step(lower_batch, options.lower.accumulation, ranks.rank, ranks.ranks),
                        options.lower.steps,
                        options.workers,
                    )
                ),
                options.lower.steps,
            ),
            title=title,
            on_trouble=options.run.on_trouble,
            upper_batch=_upper_level(task, keeping),
            weighting=objective.weighting,
            dev=dev,
        )
        on_line: list[Callable[[int, Tensor | None], None]] = [tracking.follow]
        if logged is not None:
            on_line.append(lambda step, _: logged(step))
        if run.writes:
            on_line.append(watcher(run.log, title, options.lower.steps))
        logging = StepLogging(
            options.run.log_every, rates, options.run.progress, on_line, options.run.profile
        )
        end = train(run, training, logging)
        clock.lap("train")
        with run.keeping(end):
            save = partial(save_trained, prm, writes=run.writes, shards=trained.shards)
            state, steps = end.state, options.lower.steps
            results: dict[str, Any] = {"rows": {}, "seed": options.seed}
            if dev is not None:
                kept = best_of(end.dev) if dev.keeps_best else end.dev[-1]
                results["model_selection"] = selection(end.dev, kept)
                if kept.step != steps:
                    save(state.lower_params, options, run.directory / "last")
                    state, steps = dev.chosen(run, state, end.dev), kept.step
            save(state.lower_params, options, run.directory)
            results["troubles"] = dict(end.seen.counts)
            lines = log_lines(run.log, title) if run.writes else []
            results["signs"] = dict(signs(lines, options.lower.steps))
            micro_batches = steps * options.lower.accumulation
            visits = count_visits(draw, micro_batches, len(lower_examples(options, data)))
            results |= _report_weights(task, state, initial, visits, run, tracking)
            results |= evaluate_all(prm, state.lower_params, data, options, run.directory)
            clock.lap("evaluate")
            results["seconds"] = clock.laps
            write_card(run.directory, results)
            write_json(run.directory / "results.json", results)
            remove_kept(run.directory)
    print_summary(results, run.directory, beside)
    return run.directory


def _beside(options: TrainOptions) -> Beside | None:
    """Return the rows of ``--compare-with`` on the test file; if there are none, say so."""
    path, test_file = options.data.compare_with, options.data.test_file
    if path is None or test_file is None:
        return None
    found = rows_beside(path, test_file)
    if found is None:
        say(f"--compare-with {path}: no seed of it has the test file {test_file}")
    return found


def _report_weights(
    task: _Task,
    state: State,
    initial: _Initial | None,
    visits: Tensor,
    run: Run,
    tracking: Tracking,
) -> dict[str, Any]:
    """Write the weights and the weighting of a trained run, and return the results on them."""
    directory = run.directory
    options, data, objective = task.options, task.data, task.objective
    examples = lower_examples(options, data)
    reference = None if initial is None else initial.scores
    weights, raw = final_weights(options, objective, state, data, reference)
    columns = {"weight": weights, "raw_weight": raw, "visits": visits}
    if initial is None and objective.weighting is not None and options.initial_loss:
        initial = _initial_scores(task, run, lambda: _initial_model(task, run))
    if initial is not None and options.initial_loss:
        columns["initial_loss"] = initial.losses
    write_weights(directory / "weights.jsonl", examples, columns)
    if objective.weighting is None:
        return {}
    tracking.histogram(int(state.lower_steps), ALL_WEIGHTS, weights)
    write_weighting(directory / "weighting", objective, state.upper_params, data)
    report = {}
    if isinstance(objective.weighting, StepLabels):
        labels = learned_labels(objective.weighting, state.upper_params, examples)
        write_labels(directory / LABELS, examples, *labels)
        report = label_report(examples, *labels)
    first = None if initial is None else initial.scores
    lower = state.lower_params
    write_extremes(directory, objective.prm, lower, examples, weights, first, options)
    correlation = label_correlation(examples, weights)
    report["weight_label_correlation"] = correlation
    return report | weight_report(examples, weights)


def _initial_model(task: _Task, run: Run) -> tuple[PRM, Mapping[str, Tensor]]:
    """Return the model before the first step, loaded again: the one in memory is trained.

    Raises:
        RunError: It is not the model that the run began with.
    """
    options = task.options
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        trained = load_trained(options, task.placement, options.init_from)
    # Rank 0 alone knows what the run began with, and tells the others.
    if run.writes and _digest(trained) != run.checkpoints.identity["model"]:
        flag = "--model" if options.init_from is None else "--init-from"
        raise RunError(
            f"{flag} {options.init_from or options.model}: changed since the run began, so that "
            "the initial losses are not known; put it back, or resume with --no-initial-loss"
        )
    kept = task.objective.prm  # What its frozen front computed has not changed.
    return replace(trained.prm, boundary=kept.boundary, front=kept.front), trained.lower


def _digest(trained: Trained) -> str:
    return digest_model(trained.prm.model) if trained.shards is None else trained.digest


class _Clock:
    """The seconds of every phase of a run."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._since, 2)
        self._since = now


def _objective(options: TrainOptions, prm: PRM, data: TrainData) -> Objective:
    return Objective(
        prm,
        AGGREGATIONS[options.aggregation],
        options.loss_target,
        make_weighting(
            options,
            len(data.train),
            len(data.domains),
            max(len(example.labels) for example in data.train.facts),
        ),
        options.weighting.features,
        options.weighting.reference_features,
        len(data.domains),
        full_vocab=options.probability == "vocabulary",
        lower_loss=options.lower.loss,
        normalise_given=options.weighting.normalise == "batch",
    )


def _with_gradients(
    options: TrainOptions,
    objective: Objective,
    lower: Mapping[str, Tensor],
    data: TrainData,
    placement: Placement,
) -> TrainData:
    """Return the data with the gradient features of the training set under the initial model."""
    assert isinstance(options.weighting, NetOptions)
    count = options.weighting.gradient_features
    with blaming(f"--gradient-features {count}"):
        found = fit_gradients(
            objective, lower, data.train, placement, count, shown=options.run.progress
        )
    return replace(data, gradients=found)


def _initial_scores(
    task: _Task, run: Run, model: Callable[[], tuple[PRM, Mapping[str, Tensor]]]
) -> _Initial:
    """Return the scores of the training set, which an earlier run may have kept.

    Args:
        task: The task of the run.
        run: The run, which knows the digest of its initial model.
        model: The initial model and the parameters that are trained, loaded if they are needed.
    """
    options, data = task.options, task.data.train
    cache = None
    if task.ranks.ranks == 1:  # Otherwise all ranks score together, or none does.
        folder, identity = cache_folder(options, run.directory), run.checkpoints.identity
        cache = initial_score_cache(task.objective.prm, data, options, identity, folder)
    scores, mask = kept_scores(cache, lambda: step_scores_of(*model(), data, options))
    return _Initial(scores, initial_losses(scores, mask, data))


def _lower_level(task: _Task, initial: _Initial | None) -> tuple[Draw, Callable[[int], Batch]]:
    """Return the draw of the lower level, and its numbered micro-batches."""
    options, data = task.options, task.data
    examples = lower_examples(options, data)
    if options.weighting.lower_data == "meta":
        draw = lower_meta_draw(options, examples)
        return draw, meta_batch(draw, examples)
    columns = {}
    if initial is not None and task.objective.reads_reference:
        columns["reference_probs"] = initial.scores
    if data.gradients is not None:
        columns["gradient"] = data.gradients.features
    if data.fixed_weights is not None:
        given = data.fixed_weights
        columns["weights"] = (
            mean_one_over(given, given) if options.weighting.normalise == "table" else given
        )
    draw = lower_draw(options, range(len(examples)))
    return draw, train_batch(draw, examples, columns)


def _upper_level(task: _Task, keeping: Keeping) -> Callable[[int], Batch] | None:
    """Return the meta batch of every step, or None without an upper level."""
    options, meta = task.options, task.data.meta
    if task.objective.weighting is None or meta is None:
        return None
    steps = options.lower.steps
    every = options.upper.unroll_steps * upper_gradient_every(options)
    width = task.objective.prm.tree_width
    draw, ranks = upper_draw(options, meta), task.ranks
    batch = meta_batch(draw, meta, ranks.rank, ranks.ranks, tree_width=width)
    batches = keeping(ahead(batch, steps, options.workers, every))
    return task.placement.batches(batches, steps, every)


def _first_examples(task: _Task, lower: Mapping[str, Tensor]) -> Batch:
    """Return what the weighting reads of the run's first training examples, on the host.

    Whole micro-batches, until there are 64 examples or all of the file, as the model before the
    first step sees them. The torch generators are left as they are.
    """
    options, data, objective = task.options, task.data, task.objective
    size = options.lower.batch_size
    count = min(-(-_SHOWN_EXAMPLES // size), max(1, len(data.train) // size))
    draw = lower_draw(options, range(len(data.train)))
    columns = {} if data.gradients is None else {"gradient": data.gradients.features}
    rows = [row for n in range(count) for row in draw(n)]
    batch = train_batch(lambda _: rows, data.train, columns)
    placed = task.placement.batches(batch, 1)(0)
    with torch.random.fork_rng(), torch.no_grad():
        _, outputs = objective.per_example_loss(lower, placed)
        placed = {**placed, "reference_probs": outputs["step_probs"]}
        read = objective.weighting_batch(placed, outputs)
    return {name: value.detach().cpu() for name, value in read.items() if torch.is_tensor(value)}


def _method(task: _Task, lower: Mapping[str, Tensor]) -> _Method:
    """Return the method, its solver being that of this rank."""
    made = _method_of_all(task, lower)
    upper_size = task.objective.upper_size
    return made._replace(solver=over_ranks(made.solver, task.ranks, upper_size, task.shards))


def _method_of_all(task: _Task, lower: Mapping[str, Tensor]) -> _Method:
    options, objective = task.options, task.objective
    trained = sum(leaf.numel() for leaf in lower.values())
    rates: dict[str, Callable[[int], float]] = {"lower_lr": lower_schedule(options)}
    if options.weighting.lower_data == "meta":
        problem = BilevelProblem(lower_loss=objective.upper_loss, upper_loss=objective.upper_loss)
        return _Method(make_plain_solver(options, problem, trained), {}, rates)
    weighting = objective.weighting
    if weighting is None:
        return _Method(make_plain_solver(options, objective.problem(), trained), {}, rates)
    upper = weighting.init(torch.Generator().manual_seed(options.seed))
    scale = time_scale(
        options,
        weighting,
        len(lower_examples(options, task.data)),
        lambda: NetTravel(
            weighting,
            upper,
            _first_examples(task, lower),
            partial(scheduled_upper_optimizer, options),
            upper_schedule(options, 1.0),
        ),
    )
    print_time_scale(scale)
    rates["upper_lr"] = logged_upper_rate(options, scale.upper_lr)
    upper = task.placement.params(upper)
    return _Method(make_solver(options, objective, scale.upper_lr, trained), upper, rates)
