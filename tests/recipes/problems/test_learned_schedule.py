"""The learned step against plain arithmetic and another implementation, and the command."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import cross_entropy

from bilevel import WarmupCosine, check_hypergradient, tree
from recipes.options.values import OptionError
from recipes.problems import learned_schedule
from recipes.problems.digit_reweighting import logits
from recipes.problems.learned_schedule import (
    ScheduleOptions,
    constant,
    from_shape,
    judge,
    learn,
    lower_loss,
    main,
    make_solver,
    make_task,
    search_grid,
    train,
)
from tests.bilevel.run_window import run_window

OPTIONS = ScheduleOptions(steps=4, runs=2, rows=12, batch_size=5, hidden=3, wrong_share=0.25)


def double(params):
    return tree.map(torch.Tensor.double, params)


@pytest.fixture(scope="module")
def task():
    """Float64 rows and networks."""
    task = make_task(OPTIONS)
    batches = lambda run: [  # noqa: E731
        [{**batch, "x": batch["x"].double()} for batch in step] for step in task.batches(run)
    ]
    rows = [vars(scans) | {"x": scans.x.double()} for scans in task[:3]]
    scans = [type(task.train)(**each) for each in rows]
    return task._replace(
        train=scans[0],
        validation=scans[1],
        test=scans[2],
        network=lambda run: double(task.network(run)),
        batches=batches,
    )


def schedule_of(steps=4):
    places = torch.arange(steps, dtype=torch.float64)
    return {"log_rate": -1 + 0.3 * places, "log_decay": -3 - 0.2 * places}


def test_rows_are_disjoint_and_the_wrong_share_is_exact():
    task = make_task(ScheduleOptions(rows=600, wrong_share=0.3))
    parts = [scans.source for scans in task[:3]]
    assert [len(part) for part in parts] == [600, 500, 397]
    assert len(torch.cat(parts).unique()) == 1497
    assert int((~task.train.clean).sum()) == 180
    assert bool(task.validation.clean.all())
    assert bool(task.test.clean.all())


def test_runs_differ_and_repeat(task):
    for first, second in zip(task.batches(3), task.batches(3), strict=True):
        assert torch.equal(first[0]["x"], second[0]["x"])
    assert [step[0]["step"] for step in task.batches(3)] == [0, 1, 2, 3]
    assert not torch.equal(task.batches(3)[0][0]["x"], task.batches(4)[0][0]["x"])
    same = tree.map(torch.equal, task.network(3), task.network(3))
    assert all(same.values())
    assert not torch.equal(task.network(3)["in.weight"], task.network(4)["in.weight"])


def test_the_step_is_gradient_descent_with_that_rate_and_decay(task):
    schedule, theta, (batch,) = schedule_of(), task.network(0), task.batches(0)[2]
    solver = make_solver(4, 1, 0.0)
    state = solver.init(theta, schedule)
    params, _ = solver.lower_optimizer.update(
        torch.func.grad(lower_loss)(theta, schedule, batch), state.lower_optimizer, theta
    )
    rate, decay = float(schedule["log_rate"][2].exp()), float(schedule["log_decay"][2].exp())
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in theta.items()}
    optimizer = torch.optim.SGD(leaves.values(), lr=rate, weight_decay=decay / rate)
    cross_entropy(logits(leaves, batch["x"]), batch["y"]).backward()
    optimizer.step()
    for name, leaf in leaves.items():
        torch.testing.assert_close(params[name], leaf.detach(), rtol=1e-12, atol=1e-15)


def test_the_hypergradient_is_that_of_a_plain_training_loop(task):
    schedule, validation = schedule_of(), {"x": task.validation.x, "y": task.validation.y}
    solver = make_solver(4, 1, 1.0)
    state = solver.init(task.network(0), schedule)
    result = run_window(
        solver.hypergradient,
        solver.problem,
        solver.lower_optimizer,
        state.lower_params,
        state.upper_params,
        state.lower_optimizer,
        task.batches(0),
        validation,
        state.memory,
    )
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in schedule.items()}
    theta = {name: leaf.requires_grad_() for name, leaf in task.network(0).items()}
    for step, (batch,) in enumerate(task.batches(0)):
        loss = cross_entropy(logits(theta, batch["x"]), batch["y"])
        gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        rate, decay = leaves["log_rate"][step].exp(), leaves["log_decay"][step].exp()
        theta = {
            name: leaf - rate * gradient - decay * leaf
            for (name, leaf), gradient in zip(theta.items(), gradients, strict=True)
        }
    upper = cross_entropy(logits(theta, validation["x"]), validation["y"])
    torch.testing.assert_close(result.upper_loss, upper.detach(), rtol=1e-12, atol=0)
    expected = torch.autograd.grad(upper, list(leaves.values()))
    for name, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(result.hypergradient[name], gradient, rtol=1e-9, atol=1e-15)


def test_the_audit_agrees(task):
    solver = make_solver(4, 1, 1.0)
    state = solver.init(task.network(0), schedule_of())
    validation = {"x": task.validation.x, "y": task.validation.y}
    check = check_hypergradient(
        solver,
        state,
        task.batches(0),
        validation,
        generator=torch.Generator().manual_seed(0),
    )
    assert check, check.message


def test_every_run_starts_afresh(task):
    """With rate 0 of the upper level nothing is learned; with one run, Adam moves every entry."""
    schedule = schedule_of()
    still = learn(make_solver(4, 2, 0.0), task, schedule, 2)
    moved = learn(make_solver(4, 1, 0.125), task, schedule, 1)
    for name, leaf in schedule.items():
        assert torch.equal(still[name], leaf)
        # Adam's first step is the rate, whatever the gradient, up to eps / |gradient|.
        torch.testing.assert_close(
            (moved[name] - leaf).abs(), torch.full_like(leaf, 0.125), rtol=1e-2, atol=0
        )


def test_shapes():
    cosine = from_shape(learned_schedule._SHAPES["cosine"], 10, 0.7, 0.01)
    expected = torch.tensor([WarmupCosine(0.7, 0, 10)(step) for step in range(10)])
    torch.testing.assert_close(cosine["log_rate"].exp(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(cosine["log_decay"].exp(), 0.01 * expected, rtol=1e-5, atol=0)
    flat = constant(3, 0.5, 0.01)
    torch.testing.assert_close(flat["log_rate"].exp(), torch.full((3,), 0.5))
    torch.testing.assert_close(flat["log_decay"].exp(), torch.full((3,), 0.01))


def test_the_grid_takes_the_least_validation_loss(monkeypatch):
    monkeypatch.setattr(learned_schedule, "_RATES", (0.1, 0.4))
    monkeypatch.setattr(learned_schedule, "_DECAYS", (0.0, 0.1))
    options = ScheduleOptions(steps=6, rows=60, hidden=8, grid_runs=2)
    task, shape = make_task(options), learned_schedule._SHAPES["constant"]
    chosen, found = search_grid(task, options, shape)

    def loss(schedule):
        first = learned_schedule._FOR_GRID
        runs = [train(task, schedule, run) for run in (first, first + 1)]
        return sum(judge(theta, task.validation)[0] for theta in runs) / 2

    losses = {
        (rate, decay): loss(from_shape(shape, 6, rate, decay))
        for rate in (0.1, 0.4)
        for decay in (0.0, 0.1)
    }
    best = min(losses, key=lambda pair: losses[pair])
    assert (found["rate"], found["decay_over_rate"]) == best
    assert loss(chosen) == losses[best]


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(learned_schedule, "_RATES", (0.1, 0.4))
    output = tmp_path / "found.json"
    small = ["--steps", "3", "--runs", "2", "--rows", "20", "--batch-size", "10", "--hidden", "4"]
    counts = ["--grid-runs", "1", "--test-runs", "2"]
    assert main([*small, *counts, "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert report["seeds"] == [0]
    text = capsys.readouterr().out
    for title, row in report["rows"].items():
        assert title in text
        assert len(row["rates"]) == len(row["decays"]) == 3
        assert row["test_loss"]["low"] <= row["test_loss"]["mean"] <= row["test_loss"]["high"]
    assert [row["runs"] for row in report["rows"].values()] == [8, 8, 0, 2]
    assert "step by step" in text


def test_options_that_cannot_be_used():
    with pytest.raises(OptionError, match="--batch-size"):
        ScheduleOptions(rows=10, batch_size=11)
    assert main(["--start-rate", "0"]) == 2
