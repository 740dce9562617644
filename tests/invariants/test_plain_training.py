"""Weights that are 1 and stay there leave plain training untouched, to the last bit."""

from __future__ import annotations

import json

import pytest
import torch

from bilevel import AdamW, WarmupCosine, tree
from prm.losses import step_cross_entropy
from prm.models.model import load_prm, save_prm, split_parameters, step_logits
from recipes.models.loading import read_examples
from recipes.train.batches import epoch_order
from recipes.train.training import run_training
from tests.tiny_task import FORWARD_MODE, model_bits, read_lines

TABLE = {"weighting": "table", "bound": "clip"}
WEIGHTINGS = {
    "net": {"weighting": "net"},
    "net, leaky relu": {"weighting": "net", "bound": "leaky-relu"},
    "table": TABLE,
    "table, lazy": {**TABLE, "upper_optimizer": "lazy-adam"},
    "table, over all rows": {**TABLE, "normalise": "table"},
    "table, softplus": {"weighting": "table", "bound": "softplus"},
    "table, redone step": {**TABLE, "rollback": True},
    "domain": {"weighting": "domain", "bound": "softplus"},
}
ROUTES = [
    ("auto", "upper-first"),
    ("auto", "lower-first"),
    ("ghost", "upper-first"),
    ("per-example", "upper-first"),
    ("per-example", "lower-first"),
    ("jvp", "upper-first"),
    ("jvp", "lower-first"),
    ("reverse", "lower-first"),
    ("central-difference", "lower-first"),
]


@pytest.fixture(scope="module")
def plain(task, tmp_path_factory):
    """The model of plain training, No Selection."""
    return run_training(task.train(tmp_path_factory.mktemp("plain") / "run", weighting="none"))


def test_no_selection_is_the_textbook_loop(task, plain, tmp_path):
    options = task.train(tmp_path)
    prm = load_prm(task.model)
    params, _ = split_parameters(prm.model, options.lower.freeze)
    data = read_examples(prm, options, options.train_file)
    order = epoch_order(len(data), 1)  # seed 0, the stream of the lower level
    optimizer = AdamW(
        WarmupCosine(options.lower.lr, 0, options.lower.steps),
        betas=options.lower.betas,
        weight_decay=options.lower.weight_decay,
        max_norm=options.lower.max_norm,
    )
    state = optimizer.init(params)
    for step in range(options.lower.steps):
        batch = data.batch(order(step * options.lower.batch_size, options.lower.batch_size))
        leaves = tree.map(lambda leaf: leaf.detach().requires_grad_(), params)
        losses = step_cross_entropy(
            step_logits(prm, leaves, batch), batch["labels"], batch["step_mask"]
        )
        losses.mean().backward()
        grads = {name: leaf.grad for name, leaf in leaves.items()}
        with torch.no_grad():
            params, state = optimizer.update(grads, state, params)
    save_prm(prm, params, tmp_path / "model")
    assert model_bits(tmp_path) == model_bits(plain)


@pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS)
def test_frozen_weights_of_one_change_nothing(task, plain, tmp_path, weighting):
    run = run_training(task.train(tmp_path / "run", upper_lr="0", **weighting))
    assert [entry["weight"] for entry in read_lines(run / "weights.jsonl")] == [1.0] * 18
    # The upper level did its work, in vain.
    assert [entry.get("hypergradient_norm", 0) > 0 for entry in read_lines(run / "log.jsonl")] == [
        False, True, True, True,
    ]  # fmt: skip
    assert model_bits(run) == model_bits(plain)


@FORWARD_MODE
@pytest.mark.parametrize(("route", "order"), ROUTES)
@pytest.mark.parametrize("weighting", ["net", "table"])
def test_every_route_leaves_the_lower_level_alone(task, plain, tmp_path, weighting, route, order):
    more = {**WEIGHTINGS[weighting], "route": route, "order": order}
    run = run_training(task.train(tmp_path / "run", upper_lr="0", **more))
    assert model_bits(run) == model_bits(plain)


def test_dot_route_leaves_the_lower_level_alone(task, tmp_path):
    single = {"batch_size": 1, "accumulation": 3}
    plain = run_training(task.train(tmp_path / "plain", weighting="none", **single))
    table = {**TABLE, "normalise": "none", "upper_lr": "0", "route": "dot"}
    run = run_training(task.train(tmp_path / "run", **table, **single))
    assert model_bits(run) == model_bits(plain)


@pytest.mark.parametrize("weighting", ["net", "table", "domain"])
def test_moving_weights_do_change_the_model(task, plain, tmp_path, weighting):
    run = run_training(task.train(tmp_path / "run", **WEIGHTINGS[weighting]))
    assert model_bits(run) != model_bits(plain)


@pytest.mark.parametrize("level", [1.0, 0.25])
def test_given_weights_that_are_all_alike_change_nothing(task, plain, tmp_path, level):
    ids = [row["id"] for row in read_lines(task.data / "train.jsonl")]
    given = tmp_path / "weights.jsonl"
    given.write_text("".join(json.dumps({"id": name, "weight": level}) + "\n" for name in ids))
    more = {"weighting": "none", "weights_file": str(given)}
    run = run_training(task.train(tmp_path / "run", **more))
    assert model_bits(run) == model_bits(plain)
