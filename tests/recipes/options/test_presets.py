"""Shipped presets of published settings: they resolve, go together, and take steps."""

from __future__ import annotations

import json
import math
from inspect import unwrap

import pytest

from prm.aggregations import AGGREGATIONS, logit_mean
from recipes.embedded.vocabulary import SYSTEM_PROMPT
from recipes.method.bounded_weights import make_weighting
from recipes.options.parse import changed, resolve
from recipes.options.train import ColdStartOptions, TrainOptions
from recipes.train.cold_start import run_cold_start
from recipes.train.training import run_training
from tests.tiny_task import read_lines
from weighting import Clip, Sigmoid

COLD_STARTS = ("official-cold-start", "paper-cold-start")
TRAININGS = ("official-table", "official-net", "paper-table", "paper-net", "dreamprm-domain")


def options_of(name):
    return resolve(ColdStartOptions if name in COLD_STARTS else TrainOptions, {"config": name})


@pytest.mark.parametrize("name", [*COLD_STARTS, *TRAININGS])
def test_presets_take_steps(task, tmp_path, name):
    short = {
        "train_file": str(task.data / "train.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "system_prompt": SYSTEM_PROMPT,
        "freeze": ("vision_tower",),
        "log_every": 1,
        "progress": False,
    }
    options = options_of(name)
    if name in COLD_STARTS:
        run = run_cold_start(changed(options, **short, model=str(task.model), steps=2))
        assert len(read_lines(run / "log.jsonl")) == 2
        return
    model = "model" if options.init_from is None else "init_from"
    short |= {model: str(task.model), "meta_file": str(task.data / "meta.jsonl")}
    steps = 2 * options.upper.unroll_steps
    run = run_training(changed(options, **short, test_file=None, steps=steps))
    log = read_lines(run / "log.jsonl")
    assert len(log) == steps
    # An upper step at the end of every window.
    upper = [line for line in log if "upper_loss" in line]
    assert len(upper) == 2
    for line in upper:
        assert math.isfinite(line["hypergradient_norm"])
        # In float32 a difference of losses near 5 cannot show a derivative of 1e-6.
        assert line["hypergradient_norm"] > 0 or options.hypergradient.route == "central-difference"
    assert json.loads((run / "results.json").read_text())["rows"] == {}


def test_the_originals_choices_arrive():
    table = options_of("official-table")
    made = make_weighting(table, 5, 0)
    assert made.bound == Clip(-1.0, 3.0, recover=False)
    assert (made.prior, made.normalise) == (1.0, "none")
    net = make_weighting(options_of("official-net"), 5, 0)
    assert (net.features, net.hidden, net.layers) == (2, 10, 1)
    assert (net.bound, net.prior, net.centre, net.normalise) == (Sigmoid(1.0), 0.5, False, False)
    assert AGGREGATIONS[options_of("dreamprm-domain").aggregation] is unwrap(logit_mean)
    for name in ("official-table", "official-net"):
        options = options_of(name)
        assert (
            options.lower.batch_size,
            options.upper.meta_batch_size,
            options.upper.unroll_steps,
        ) == (1, 1, 1)
        assert (options.probability, options.loss_target) == ("vocabulary", "both")
