"""No option that does nothing, no choice that its consumer does not take."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch

import recipes.use.evaluate
import recipes.use.relabel
import recipes.use.weigh
from bilevel import SGD, AdamW, LazyRowAdam, OneStep, Projected, WarmupCosine
from bilevel.optimizers.schedule import Constant, StepDecay
from bilevel.routes import CentralDifference, Route
from prm.aggregations import AGGREGATIONS
from prm.models.model import load_prm
from prm.placement import Placement
from recipes import commands
from recipes.embedded.vocabulary import SYSTEM_PROMPT
from recipes.evaluation.table import NAMES
from recipes.method.bounded_weights import make_bound, make_weighting
from recipes.method.make_solver import (
    lower_schedule,
    make_solver,
    scheduled_upper_optimizer,
    upper_optimizer,
    upper_schedule,
)
from recipes.method.objective import Objective
from recipes.method.time_scale import time_scale
from recipes.models.loading import placement_of, read_examples
from recipes.options.embedded import CompareOptions, DataOptions, PretrainOptions
from recipes.options.flat import flat_options, flatten
from recipes.options.parse import changed, train_options
from recipes.options.rules import unread
from recipes.options.train import ColdStartOptions, TrainOptions
from recipes.options.use import (
    ConvertModelOptions,
    EvaluateOptions,
    RelabelOptions,
    ScoreOptions,
    SelectOptions,
    WeighOptions,
)
from recipes.options.values import OptionError, element
from recipes.run.directory import free_directory
from recipes.train.cold_start import run_cold_start
from recipes.train.results import row_name
from recipes.train.training import run_training
from tests.recipes.options.recorded import not_read, read_only_what_is_used, recorded, where_read
from tests.tiny_task import FORWARD_MODE, altered, read_lines
from weighting import FEATURES, DomainTable, InstanceNet, InstanceTable, NetTravel, StepLabels

PACKAGE = Path(recipes.__file__).parent
OPTIONS = [
    ColdStartOptions,
    CompareOptions,
    ConvertModelOptions,
    DataOptions,
    EvaluateOptions,
    PretrainOptions,
    RelabelOptions,
    ScoreOptions,
    SelectOptions,
    TrainOptions,
    WeighOptions,
]
BASE = train_options(train_file="t", output_dir="o", batch_size=4, steps=20, upper_start=0)


def choices(name: str) -> tuple[str, ...]:
    kind, _ = element(flat_options(TrainOptions)[name].hint)
    assert get_origin(kind) is Literal
    return get_args(kind)


def read_attributes() -> Iterator[str]:
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name in ("options", "bench"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = ast.unparse(node.value)
                if owner.partition(".")[0] in ("options", "settings"):
                    yield node.attr


def own_names(kind: type) -> set[str]:
    """Names of the options, as attributes of their groups."""
    names = set()
    for f in fields(kind):
        inner = [f.metadata["group"]] if "group" in f.metadata else []
        inner += f.metadata.get("variants", {}).values()
        names |= set().union(*map(own_names, inner)) if inner else {f.name}
    return names


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_is_read(options):
    assert own_names(options) <= set(read_attributes())


@pytest.fixture
def recording(monkeypatch):
    """Options, and the set of those that have been read since."""
    read_only_what_is_used(monkeypatch)
    monkeypatch.setattr(recipes.use.evaluate, "check_together", lambda options: None)
    monkeypatch.setattr(recipes.use.relabel, "check_together", lambda options: None)
    monkeypatch.setattr(recipes.use.weigh, "check_together", lambda options: None)
    monkeypatch.setattr(recipes.use.weigh, "refuse_given", lambda *_: None)
    return recorded


def test_cold_start_reads_each_of_its_options(task, tmp_path, recording):
    options, seen = recording(
        task.cold_start(tmp_path / "run", lora_rank=2, frozen_activations="disk")
    )
    run_cold_start(options)
    assert not_read(ColdStartOptions, seen) == {"max_bad_rows"}


@FORWARD_MODE
def test_training_reads_each_of_its_options(task, tmp_path, recording):
    read = []
    evaluated = {"dev_file": str(task.data / "dev.jsonl"), "eval_every": 4, "keep_best": True}
    implicit = {"hypergradient": "implicit", "solver_iterations": 1, "lower_weight_decay": 0.0}
    for name, more in (
        ("net", {"bound": "clip"}),
        ("table", {"weighting": "table", "bound": "clip"}),
        ("labels", {"weighting": "labels", "steps": 1, "test_file": None}),
        ("none", {"weighting": "none", "frozen_activations": "disk", **evaluated}),
        ("implicit", implicit),
        ("penalty", {"hypergradient": "penalty"}),
        ("lora", {"lora_rank": 2, "weighting": "none", "steps": 1}),
    ):
        given = task.train(tmp_path / name, **more)
        options, seen = recording(given)
        run_training(options)
        read.append(seen)
    assert not_read(TrainOptions, *read) == {"max_bad_rows"}
    # What only one of them has to do with.
    assert "hidden" in read[0] - read[1]


def test_evaluation_reads_each_of_its_options(task, tmp_path, recording):
    given = EvaluateOptions(
        model=str(task.model),
        file=str(task.data / "test.jsonl"),
        output=str(tmp_path / "out.json"),
        system_prompt=SYSTEM_PROMPT,
    )
    options, seen = recording(given)
    assert commands.run("evaluate", options) == 0
    assert not_read(EvaluateOptions, seen) == {"dev_scores", "max_bad_rows"}
    assert set(unread(EvaluateOptions, flatten(given))) == {"dev_scores", "max_bad_rows"}


@pytest.mark.parametrize(("command", "kind"), [("score", ScoreOptions), ("select", SelectOptions)])
def test_use_reads_each_of_its_options(task, tmp_path, recording, command, kind):
    scores = tmp_path / "scores.jsonl"
    given = {
        "score": {"model": str(task.model), "file": str(task.data / "dev.jsonl")},
        "select": {"scores": str(scores), "output": str(tmp_path / "best.jsonl")},
    }
    for name, kind_of in (("score", ScoreOptions), ("select", SelectOptions)):
        more = {"output": str(scores)} if name == "score" else {}
        options, seen = recording(kind_of(**given[name], **more))
        assert commands.run(name, options) == 0
        if name == command:
            assert not_read(kind, seen) == {"max_bad_rows"}
            return


RULES = get_args(get_type_hints(WeighOptions)["by"])


@pytest.mark.parametrize("by", RULES)
def test_weigh_reads_what_it_does_not_refuse(task, tmp_path, recording, by):
    given = {"file": str(task.data / "train.jsonl"), "output": str(tmp_path / "w"), "by": by}
    if by == "weighting":
        run = run_training(task.train(tmp_path / "run", weighting="table", bound="clip", steps=2))
        given["weighting"] = str(run / "weighting")
    given["model"] = str(task.model) if by == "small-loss" else WeighOptions.model
    options, seen = recording(WeighOptions(**given))
    assert commands.run("weigh", options) == 0
    seen = seen - {"seed"}  # of every command: set_up
    refused = set(unread(WeighOptions, flatten(options)))
    if by == "weighting":  # a table, which asks no model
        refused |= set(WeighOptions.ASKS_MODEL)
    assert not refused & seen
    assert not_read(WeighOptions, seen) <= refused | {"seed"}


@pytest.mark.parametrize("by", get_args(get_type_hints(RelabelOptions)["by"]))
def test_relabel_reads_what_it_does_not_refuse(task, tmp_path, recording, by):
    def confident(_, row):
        return row | {"self_confidence": 1.0}

    train = altered(task.data / "train.jsonl", tmp_path / "train.jsonl", confident)
    given = {"file": str(train), "output": str(tmp_path / "new.jsonl"), "by": by}
    given |= {"allow_outside_images": True}
    if by == "learned":
        signs = {"+": 1.0, "-": 0.0}
        given["labels"] = str(tmp_path / "labels.jsonl")
        lines = []
        for row in read_lines(train):
            labels = [signs[step["label"]] for step in row["steps"]]
            lines.append(json.dumps({"id": row["id"], "given": labels, "learned": labels}) + "\n")
        (tmp_path / "labels.jsonl").write_text("".join(lines))
    given["model"] = str(task.model) if by == "nait" else RelabelOptions.model
    options, seen = recording(RelabelOptions(**given))
    assert commands.run("relabel", options) == 0
    seen = seen - {"seed"}  # of every command: set_up
    refused = set(unread(RelabelOptions, flatten(options)))
    assert not refused & seen
    assert not_read(RelabelOptions, seen) <= refused | {"seed"}


def test_every_choice_is_tested_below():
    entries = flat_options(TrainOptions).values()
    found = {entry.name for entry in entries if get_origin(element(entry.hint)[0]) is Literal}
    assert found == {
        "activation_checkpointing",
        "aggregation",
        "attention",
        "bound",
        "context",
        "execution",  # in tests/recipes/train/test_execution.py
        "sharding",  # in tests/recipes/train/test_sharding.py
        "frozen_activations",  # in tests/recipes/models/test_frozen.py
        "hypergradient",
        "linear_solver",
        "loss_target",
        "lower_data",
        "lower_loss",
        "on_bad_row",
        "lora_save",
        "lower_schedule",
        "normalise",
        "on_existing",
        "on_trouble",
        "order",
        "precision",
        "probability",
        "report_to",  # in tests/recipes/train/test_trackers.py
        "route",
        "too_long",
        "upper_optimizer",
        "upper_schedule",
        "weighting",
    }


@pytest.mark.parametrize("name", choices("bound"))
def test_bounds(name):
    bound = make_bound(where_read(BASE, bound=name, bound_low=-1.0, bound_high=3.0).weighting)
    expected = {
        "clip": (-1.0, 3.0),
        "clamp": (-1.0, 3.0),
        "sigmoid": (0.0, 3.0),
        "softplus": (0.0, math.inf),
        "leaky-relu": (-math.inf, math.inf),
        "relu": (0.0, math.inf),
        "none": (-math.inf, math.inf),
    }
    assert bound.range == expected[name]
    assert float(bound(torch.tensor(bound.raw(1.0)))) == pytest.approx(1.0)
    assert float(bound(torch.tensor(-0.5))) == pytest.approx(
        {
            "clip": -0.5,
            "clamp": -0.5,
            "sigmoid": 3 / (1 + math.exp(0.5)),
            "softplus": math.log1p(math.exp(-0.5)),
            "leaky-relu": -0.005,
            "relu": 0.0,
            "none": -0.5,
        }[name],
        abs=1e-6,
    )
    if name in ("clip", "clamp"):  # the pull back inside, from beyond the upper end
        raw = torch.tensor(4.0, requires_grad=True)
        bound(raw).backward()
        assert float(raw.grad) == (1.0 if name == "clip" else 0.0)
        table = make_weighting(
            where_read(BASE, weighting="table", bound=name, bound_high=3.0), 2, 0
        )
        kept = table.project({"deviation": torch.tensor([-9.0, 9.0])})["deviation"].tolist()
        assert kept == ([-1.0, 2.0] if name == "clip" else [-9.0, 9.0])


@pytest.mark.parametrize("name", choices("weighting"))
@pytest.mark.parametrize("bound", choices("bound"))
@pytest.mark.parametrize("normalise", choices("normalise"))
def test_weightings(name, bound, normalise):
    options = where_read(BASE, weighting=name, bound=bound, normalise=normalise)
    if name == "domain" and bound not in ("softplus", "sigmoid"):
        with pytest.raises(OptionError):
            make_weighting(options, 8, 3)
        return
    weighting = make_weighting(options, 8, 3)
    if name == "none":
        assert weighting is None
        return
    kinds = (InstanceNet, InstanceTable, DomainTable, StepLabels)
    kind = dict(zip(("net", "table", "domain", "labels"), kinds, strict=True))[name]
    assert type(weighting) is kind
    if name == "labels":
        assert weighting == StepLabels(8, 1, 0.9)
        assert time_scale(options, weighting, 8, lambda: None).to_bound == weighting.turn
        return
    assert weighting.bound == make_bound(options.weighting)
    features = torch.randn(8, 3, weighting.features) if name == "net" else None
    read = {"features": features, "feature_mask": torch.ones(8, 3, dtype=torch.bool)}
    travel = NetTravel(
        weighting,
        weighting.init(torch.Generator().manual_seed(0)),
        read,
        partial(scheduled_upper_optimizer, options),
        upper_schedule(options, 1.0),
    )
    assert time_scale(options, weighting, 8, lambda: travel).upper_lr > 0
    if name == "table":
        assert (weighting.size, weighting.prior, weighting.normalise) == (8, 1.0, normalise)
    elif name == "domain":
        assert weighting.size == 3
    else:
        assert weighting.normalise == (normalise == "batch")
        assert (weighting.features, weighting.hidden, weighting.layers) == (5, 10, 1)


@pytest.mark.parametrize(
    ("features", "reference", "inputs"),
    [
        (("label",), True, 1),
        (("label", "loss"), True, 3),
        (("p_plus", "p_minus"), False, 2),
        (tuple(FEATURES), True, 9),
        (("steps", "label", "loss", "domain"), True, 7),
    ],
)
def test_features_are_counted_as_they_are_made(features, reference, inputs):
    options = where_read(BASE, features=features, reference_features=reference)
    weighting = make_weighting(options, 8, 3)
    assert weighting.features == inputs
    objective = Objective(None, AGGREGATIONS["mean"], "both", weighting, features, reference, 3)
    batch = {
        "labels": torch.tensor([[1.0, 0.0], [1.0, float("nan")]]),
        "step_mask": torch.ones(2, 2, dtype=torch.bool),
        "reference_probs": torch.full((2, 2), 0.25),
        "domain": torch.tensor([2, 0]),
    }
    found, known = objective.net_inputs(batch, {"step_probs": torch.full((2, 2), 0.5)})
    assert found.shape == (2, 2, inputs)
    assert known.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("route", choices("route"))
@pytest.mark.parametrize("order", choices("order"))
@pytest.mark.parametrize("rollback", [False, True])
def test_routes_and_orders(route, order, rollback):
    more = {"weighting": "table", "normalise": "table", "bound": "clip", "batch_size": 1}
    options = changed(BASE, route=route, order=order, rollback=rollback, **more)
    objective = Objective(None, AGGREGATIONS["mean"], "both", make_weighting(options, 8, 0))
    if route == "ghost" and order == "lower-first":
        with pytest.raises(OptionError, match="--route ghost, --order lower-first"):
            make_solver(options, objective, 0.1)
        return
    solver = make_solver(options, objective, 0.1)
    assert isinstance(solver.hypergradient, OneStep)
    assert isinstance(solver.hypergradient.route, Route)
    assert type(solver.hypergradient.route).__name__.lower() == route.replace("-", "")
    assert (solver.hypergradient.order, solver.rollback) == (order, rollback)
    if route == "central-difference":
        assert solver.hypergradient.route == CentralDifference()
        solver = make_solver(changed(options, difference_radius=0.01), objective, 0.1)
        assert solver.hypergradient.route == CentralDifference(radius=0.01)


def test_every_number_of_the_levels_arrives():
    options = changed(
        BASE,
        weighting="table",
        lower_betas=(0.7, 0.8),
        lower_weight_decay=0.3,
        lower_max_norm=None,
        upper_betas=(0.6, 0.9),
        upper_weight_decay=0.2,
        unroll_steps=3,
        upper_start=5,
        accumulation=4,
        direction_decay=0.5,
        upper_gradient_every=6,
    )
    objective = Objective(None, AGGREGATIONS["mean"], "both", make_weighting(options, 8, 0))
    solver = make_solver(options, objective, 0.125)
    lower = AdamW(WarmupCosine(5e-4, 1, 20), betas=(0.7, 0.8), weight_decay=0.3, max_norm=None)
    adam = AdamW(WarmupCosine(0.125, 0, 5), betas=(0.6, 0.9), weight_decay=0.2)
    upper = Projected(adam, objective.weighting.project)
    assert (solver.lower_optimizer, solver.upper_optimizer) == (lower, upper)
    counts = (solver.unroll_steps, solver.upper_start, solver.accumulation)
    assert counts == (3, 5, 4)
    assert solver.hypergradient.direction_decay == 0.5
    assert solver.hypergradient.upper_gradient_every == 6


@pytest.mark.parametrize("name", choices("upper_optimizer"))
def test_upper_optimizers(name):
    options = changed(BASE, upper_optimizer=name, upper_schedule="constant", upper_max_norm=0.5)
    made = upper_optimizer(options, 0.25)
    adam = {"betas": (0.9, 0.999), "weight_decay": 0.0, "max_norm": 0.5}
    expected = {
        "adam": AdamW(Constant(0.25), **adam),
        "lazy-adam": LazyRowAdam(Constant(0.25), **adam),
        "sgd": SGD(Constant(0.25), max_norm=0.5),
    }
    assert made == expected[name]
    table = make_weighting(changed(options, weighting="table", bound="clip"), 8, 0)
    # One row of eight, seen every other of 20 steps: auto lets it travel the width of 1.
    scale = time_scale(changed(options, weighting="table"), table, 8, lambda: None)
    assert (scale.visits, scale.reachable) == (10.0, pytest.approx(1.0))


@pytest.mark.parametrize("name", choices("lower_schedule"))
def test_lower_schedules(name):
    expected = {
        "cosine": WarmupCosine(5e-4, 1, 20),
        "step": StepDecay(5e-4, 7, 0.5),
        "constant": Constant(5e-4),
    }
    options = where_read(BASE, lower_schedule=name, lower_step_size=7, lower_gamma=0.5)
    assert lower_schedule(options) == expected[name]


@pytest.mark.parametrize("name", choices("upper_schedule"))
def test_upper_schedules(name):
    options = changed(BASE, upper_schedule=name, upper_start=4, unroll_steps=2)
    options = where_read(options, upper_warmup=0.25, upper_step_size=3, upper_gamma=0.9)
    expected = {
        "cosine": WarmupCosine(0.5, 2, 8),
        "step": StepDecay(0.5, 3, 0.9),
        "constant": Constant(0.5),
    }
    assert upper_schedule(options, 0.5) == expected[name]


def test_aggregations():
    assert set(choices("aggregation")) == set(AGGREGATIONS)
    scores, mask = torch.tensor([[0.5, 0.8, 0.9]]), torch.tensor([[True, True, False]])
    found = {name: float(how(scores, mask)) for name, how in AGGREGATIONS.items()}
    assert found == pytest.approx(
        {
            "mean": 0.65,
            "min": 0.5,
            "max": 0.8,
            "last": 0.8,
            "product": 0.4,
            "log_mean": math.sqrt(0.4),
            "logit_mean": 1 / (1 + math.exp(-math.log(4) / 2)),
            "logit_sum": 0.8,
        }
    )


@pytest.mark.parametrize("name", choices("loss_target"))
@pytest.mark.parametrize("aggregation", choices("aggregation"))
def test_loss_targets(task, tmp_path, name, aggregation):
    options = task.train(tmp_path)
    prm = load_prm(task.model)
    batch = read_examples(prm, options, options.data.meta_file).batch(range(4))
    batch["group"] = torch.tensor([0, 0, 1, 1])
    objective = Objective(prm, AGGREGATIONS[aggregation], name, None)
    with torch.no_grad():
        assert 0 < float(objective.upper_loss({}, {}, batch)) < 4


@pytest.mark.parametrize("loss", choices("lower_loss"))
@pytest.mark.parametrize("probability", choices("probability"))
def test_lower_losses_and_probabilities(task, tmp_path, loss, probability):
    """Against the logits of a plain forward pass, at the positions of the labels."""
    prm = load_prm(task.model, dtype=torch.float64)
    batch = read_examples(prm, task.train(tmp_path), task.data / "train.jsonl").batch(range(3))
    objective = Objective(
        prm,
        AGGREGATIONS["mean"],
        "both",
        None,
        full_vocab=probability == "vocabulary",
        lower_loss=loss,
    )
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    inputs["pixel_values"] = inputs["pixel_values"].double()
    labels = [prm.plus_id, prm.minus_id]
    with torch.no_grad():
        found, features = objective.per_example_loss({}, batch)
        logits = prm.model(**inputs).logits
    for row, positions in enumerate(batch["label_positions"]):
        at = logits[row, positions[batch["step_mask"][row]]]
        two_way = at[:, labels].softmax(-1)
        probs = two_way if probability == "labels" else at.softmax(-1)[:, labels]
        truth = batch["labels"][row, : len(at)]
        likelihood = torch.where(truth == 1, probs[:, 0], probs[:, 1])
        expected = (probs[:, 0] - truth) ** 2 if loss == "squared" else -likelihood.log()
        torch.testing.assert_close(found[row], expected.mean())
        torch.testing.assert_close(features["step_probs"][row, : len(at)], two_way[:, 0])


@pytest.mark.parametrize("name", choices("context"))
def test_contexts(task, tmp_path, name):
    options = replace(task.train(tmp_path), context=name)
    prm = load_prm(task.model)
    data = read_examples(prm, options, options.train_file)
    tokens = data.batch(range(6))["input_ids"]
    signs = [int((tokens == at).sum()) for at in (prm.plus_id, prm.minus_id)]
    labels = [step.label for example in data.examples[:6] for step in example.steps[:-1]]
    expected = {
        "plus": [len(labels), 0],
        "gold": [labels.count(1.0), labels.count(0.0)],
        "masked": [0, 0],
    }
    assert signs == expected[name]


@pytest.mark.parametrize("name", choices("on_existing"))
def test_on_existing(tmp_path, name):
    full = tmp_path / "run"
    full.mkdir()
    (full / "args.yaml").write_text("")
    (tmp_path / "run-2").write_text("")
    expected = {"refuse": full, "number": tmp_path / "run-3"}
    assert free_directory(full, name) == expected[name]
    assert free_directory(tmp_path / "new", name) == tmp_path / "new"


@pytest.mark.parametrize("name", choices("precision"))
@pytest.mark.parametrize("attention", choices("attention"))
@pytest.mark.parametrize("layers", choices("activation_checkpointing"))
def test_placements(name, attention, layers):
    options = changed(
        BASE, device="cpu", precision=name, attention=attention, activation_checkpointing=layers
    )
    if attention == "flash":
        with pytest.raises(OptionError, match=r"--attention flash: .* found cpu; use sdpa"):
            placement_of(options.placement, options.activation_checkpointing)
        return
    assert placement_of(options.placement, options.activation_checkpointing) == Placement(
        torch.device("cpu"), "float32" if name == "auto" else name, attention, layers
    )


def test_every_kind_of_run_has_a_row_of_its_own_name():
    rows = [row_name(where_read(BASE, weighting=name)) for name in choices("weighting")]
    rows += [row_name(where_read(BASE, weighting="none", lower_data="meta"))]
    rows += [row_name(where_read(BASE, weighting="none", weights_file="w"))]
    assert len(set(rows)) == len(rows) == 7
    assert set(rows) <= set(NAMES)
    assert choices("lower_data") == ("train", "meta")
