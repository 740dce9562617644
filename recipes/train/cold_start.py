"""Cold start, one of the three devices that keep instance reweighting stable.

A model that has never seen the two label tokens gives them no probability, and then neither its
losses nor the scores of meta solutions give information on an example: the first hypergradients
would be noise, and the weights would follow it. So before the bilevel run the model is trained for
a few steps on a random draw of the noisy training file, with all weights 1:

    θ ← AdamW step on  mean over the batch of ℓ_i(θ),    i from ``--draw`` random examples

The result is an ordinary checkpoint, ``<run>/model``. ``train --init-from`` starts from it, and the
upper level starts at weight 1. Source: DreamPRM-1.5 (arXiv 2509.05542), cold start.
"""

from __future__ import annotations

import time
from pathlib import Path

from bilevel import ResidentSolver
from prm.aggregations import AGGREGATIONS
from recipes.method.make_solver import begin, lower_schedule, make_plain_solver, over_ranks
from recipes.method.objective import Objective
from recipes.models.frozen import Keeping, at_boundary, cache_folder
from recipes.models.loading import filled, placement_of, read_examples, set_up
from recipes.options.rules import check_together
from recipes.options.train import ColdStartOptions
from recipes.ranks import ranks_here
from recipes.run.directory import check_directory
from recipes.run.files import write_json
from recipes.run.resume import open_run
from recipes.train.batches import (
    COLD_START,
    ahead,
    epoch_order,
    lower_draw,
    per_step,
    stream_seed,
    train_batch,
)
from recipes.train.data import keep_bad_rows, refuse_other_bad_rows, require
from recipes.train.loop import StepLogging, Training, train
from recipes.train.results import print_troubles, save_trained, write_card
from recipes.train.sharding import load_trained, over_shards
from recipes.train.trackers import check_trackers, tracked


def run_cold_start(options: ColdStartOptions) -> Path:
    """Teach the model the two label tokens on a random draw of the noisy training file.

    Writes ``model`` (an ordinary checkpoint), ``log.jsonl`` and ``results.json``.

    Returns:
        The run directory.
    """
    check_together(options)
    if ranks_here().rank == 0:
        check_trackers(options.run.report_to)
        check_directory(options)
    with over_shards(options):
        return _run_cold_start(options)


def _run_cold_start(options: ColdStartOptions) -> Path:
    started = time.perf_counter()
    ranks = ranks_here()
    set_up(options)
    placement = placement_of(options.placement, options.activation_checkpointing)
    loaded = load_trained(options, placement)
    options = filled(options, loaded.prm.usage)
    lower = loaded.lower
    prm = at_boundary(loaded.prm, lower, options)
    data = require(read_examples(prm, options, options.train_file), "labels")
    refuse_other_bad_rows(options, {"train": data.bad})
    drawn = cold_start_rows(options, len(data))
    objective = Objective(  # the upper level is not used
        prm,
        AGGREGATIONS["mean"],
        "both",
        None,
        full_vocab=options.probability == "vocabulary",
        lower_loss=options.lower.loss,
    )
    trained = sum(leaf.numel() for leaf in lower.values())
    plain = make_plain_solver(options, objective.problem(), trained)
    solver = over_ranks(plain, ranks, objective.upper_size, loaded.shards)
    batch = train_batch(lower_draw(options, drawn), data)
    start, pictures = begin(solver, prm, lower, {}), {"train_file": data.pictures}
    in_place = isinstance(solver, ResidentSolver)
    opened = open_run(
        options, loaded.identified, start, pictures, in_place=in_place, shards=loaded.shards
    )
    with opened as run, tracked(run, options) as tracking:
        keep_bad_rows(run.directory, {"train": data.bad})
        keeping = Keeping(prm, options, cache_folder(options, run.directory))
        keeping.check([data])
        training = Training(
            solver,
            steps=options.lower.steps,
            lower_batches=placement.batches(
                keeping(
                    ahead(
                        per_step(batch, options.lower.accumulation, ranks.rank, ranks.ranks),
                        options.lower.steps,
                        options.workers,
                    )
                ),
                options.lower.steps,
            ),
            title="cold start",
            on_trouble=options.run.on_trouble,
        )
        rates = {"lower_lr": lower_schedule(options)}
        logging = StepLogging(
            options.run.log_every,
            rates,
            options.run.progress,
            [tracking.follow],
            options.run.profile,
        )
        end = train(run, training, logging)
        directory = run.directory
        with run.keeping(end):
            saved = save_trained(
                prm,
                end.state.lower_params,
                options,
                directory,
                writes=run.writes,
                shards=loaded.shards,
            )
            seconds = round(time.perf_counter() - started, 2)
            rows = len(drawn)
            results = {"rows": {}, "examples": rows, "seed": options.seed}
            results |= {"troubles": dict(end.seen.counts), "seconds": {"total": seconds}}
            write_card(directory, results)
            write_json(directory / "results.json", results)
    print(f"cold start on {rows} of {len(data)} examples, {seconds:.0f} s: {saved}")
    print_troubles(end.seen.counts)
    return directory


def cold_start_rows(options: ColdStartOptions, rows: int) -> list[int]:
    """Return a random draw of ``draw`` rows of ``rows``, or all if it is 0 or too large."""
    count = rows if options.draw == 0 else min(options.draw, rows)
    return epoch_order(rows, stream_seed(options, COLD_START))(0, count)
