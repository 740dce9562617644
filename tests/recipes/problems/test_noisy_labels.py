"""Splits, damage, weights of the digit recipes, and the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, one_hot

from bilevel import AdamW, check_hypergradient, tree
from recipes.options.values import OptionError
from recipes.problems.digit_reweighting import (
    init_network,
    instance_table,
    inverse_frequency,
    logits,
    make_solver,
    meta_weight_net,
    small_loss,
    uniform,
)
from recipes.problems.digit_scans import (
    joined,
    long_tail,
    read_splits,
    with_mistaken_classes,
    with_wrong_labels,
)
from recipes.problems.noisy_labels import (
    TITLES,
    NoisyLabelOptions,
    _take_times,
    _time_cell,
    batches,
    main,
    make_task,
    run_method,
    seconds_to,
)
from tests.bilevel.run_window import run_window


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_splits_are_disjoint_and_hold_every_scan_once():
    splits = read_splits(seeded())
    sources = torch.cat([scans.source for scans in splits])
    assert torch.equal(sources.sort().values, torch.arange(1797))
    assert [len(scans) for scans in splits] == [1100, 100, 200, 397]
    assert torch.bincount(splits.meta.y).tolist() == [10] * 10
    bunch = load_digits()
    for scans in splits:
        assert torch.equal(scans.x, torch.tensor(bunch.data[scans.source] / 16).float())
        assert torch.equal(scans.y, torch.tensor(bunch.target[scans.source]))
        assert bool(scans.clean.all())


def test_splits_depend_on_the_seed_alone():
    again, other = read_splits(seeded()), read_splits(seeded(1))
    assert torch.equal(read_splits(seeded()).train.source, again.train.source)
    assert not torch.equal(other.train.source, again.train.source)


@pytest.mark.parametrize("share", [0.1, 0.4, 0.999])
def test_the_share_of_wrong_labels_is_exact(share):
    scans = read_splits(seeded()).train
    spoilt = with_wrong_labels(scans, share, seeded(3))
    assert int((~spoilt.clean).sum()) == round(share * 1100)
    assert torch.equal(spoilt.true, scans.true)
    assert torch.equal(spoilt.x, scans.x)
    assert bool(scans.clean.all())


def test_wrong_labels_are_the_nine_others_alike():
    scans = read_splits(seeded()).train
    shifts = torch.cat(
        [
            ((spoilt.y - spoilt.true) % 10)[~spoilt.clean]
            for spoilt in (with_wrong_labels(scans, 0.9, seeded(seed)) for seed in range(20))
        ]
    )
    counts = torch.bincount(shifts, minlength=10).double()
    assert counts[0] == 0
    expected = counts.sum() / 9
    # χ² with 8 degrees of freedom: its 99.9 % quantile is 26.1.
    assert float(((counts[1:] - expected) ** 2 / expected).sum()) < 26.1


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_mistaken_classes_go_around_a_cycle_of_five(share):
    scans = read_splits(seeded()).train
    spoilt = with_mistaken_classes(scans, share, seeded(3))
    assert torch.equal(spoilt.true, scans.true)
    taken_for = {}
    for digit in range(10):
        rows = spoilt.true == digit
        wrong = spoilt.y[rows & ~spoilt.clean]
        assert len(wrong) in (0, round(share * int(rows.sum())))
        if len(wrong):
            (taken_for[digit],) = wrong.unique().tolist()
    assert len(taken_for) == 5
    at = start = min(taken_for)
    seen = {start}
    while (at := taken_for[at]) != start:
        seen.add(at)
    assert seen == set(taken_for)


def test_a_long_tail_falls_geometrically():
    scans = read_splits(seeded()).train
    thinned, ranked = long_tail(scans, 20.0, seeded(4))
    full = int(torch.bincount(scans.y).min())
    expected = [round(full * 20.0 ** (-rank / 9)) for rank in range(10)]
    assert torch.bincount(thinned.y, minlength=10)[ranked].tolist() == expected
    assert expected[0] / expected[-1] == pytest.approx(20, rel=0.1)
    assert len(thinned.source.unique()) == len(thinned)
    assert set(thinned.source.tolist()) <= set(scans.source.tolist())
    assert bool(thinned.clean.all())


def tiny(rows=12, hidden=4, meta=8):
    """A float64 problem on a few scans, labels partly wrong."""
    splits = read_splits(seeded())
    scans = with_wrong_labels(splits.train[torch.arange(rows)], 0.5, seeded(1))
    double = lambda params: tree.map(torch.Tensor.double, params)  # noqa: E731
    batch = {"x": scans.x.double(), "y": scans.y, "row": torch.arange(rows), "step": 9}
    clean = splits.meta[torch.arange(meta)]
    network = double(init_network(hidden, seeded(2)))
    return batch, {"x": clean.x.double(), "y": clean.y}, network, double


def warm(solver, network, phi, batch):
    state = solver.init(network, phi)
    for _ in range(3):
        state, _ = solver.step(state, [batch])
    return state


def test_the_table_hypergradient_agrees_with_differences_and_with_the_gradients():
    batch, meta, network, double = tiny()
    table = instance_table(12, 0.1)
    solver = make_solver(table, 1e-2)
    state = warm(solver, network, double(table.phi), batch)
    check = check_hypergradient(solver, state, [batch], meta, generator=seeded())
    assert check, check.message
    # By hand: with all weights 1, dL/dw_i = -⟨μ, ∇ℓ_i⟩ / n minus the mean over the batch.
    after, _ = solver.step(state, [batch])
    leaves = {name: leaf.requires_grad_() for name, leaf in after.lower_params.items()}
    upper = cross_entropy(logits(leaves, meta["x"]), meta["y"])
    v = dict(zip(leaves, torch.autograd.grad(upper, list(leaves.values())), strict=True))
    params = {name: leaf.requires_grad_() for name, leaf in state.lower_params.items()}
    losses = cross_entropy(logits(params, batch["x"]), batch["y"], reduction="none")
    leaves = list(params.values())
    rows = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in losses]
    rows = [dict(zip(params, row, strict=True)) for row in rows]
    mean = {name: torch.stack([row[name] for row in rows]).mean(0) for name in params}
    mu = AdamW(1e-2).grads_vjp(mean, state.lower_optimizer, state.lower_params, v)
    dots = torch.stack([tree.vdot(mu, row) for row in rows]) / 12
    result = run_window(
        solver.hypergradient,
        solver.problem,
        solver.lower_optimizer,
        state.lower_params,
        state.upper_params,
        state.lower_optimizer,
        [[batch]],
        meta,
        state.memory,
    )
    torch.testing.assert_close(
        result.hypergradient["deviation"], dots - dots.mean(), rtol=1e-9, atol=1e-15
    )


def test_the_net_hypergradient_agrees_with_differences():
    batch, meta, network, double = tiny()
    net = meta_weight_net(0.1, seeded(5))
    solver = make_solver(net, 1e-2)
    phi = double(net.phi)
    phi["out.weight"] = 0.3 * torch.randn(1, 100, generator=seeded(6), dtype=torch.float64)
    state = warm(solver, network, phi, batch)
    check = check_hypergradient(solver, state, [batch], meta, generator=seeded())
    assert check, check.message


def test_weights_that_are_not_learned():
    losses = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 9])
    batch = {"y": labels, "step": 10}
    assert uniform().weights({}, batch, losses).tolist() == [1.0] * 5
    kept = small_loss(0.6, 10).weights({}, batch, losses)
    torch.testing.assert_close(kept, torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]).double() / 0.6)
    early = small_loss(0.6, 10).weights({}, batch | {"step": 9}, losses)
    assert early.tolist() == [1.0] * 5
    by_class = inverse_frequency(labels).weights({}, batch, losses)
    share = one_hot(labels, 10).double().T @ by_class
    torch.testing.assert_close(share, torch.tensor([0.5, 0.5] + [0.0] * 7 + [0.5]).double())


def test_batches_visit_every_row_before_any_again():
    options = NoisyLabelOptions(steps=8, batch_size=25, eval_every=1, warm_up=0)
    scans = read_splits(seeded()).meta
    rows = torch.cat([batch["row"] for batch in batches(scans, options, seeded())])
    assert torch.equal(rows[:100].sort().values, torch.arange(100))
    assert torch.equal(rows[100:].sort().values, torch.arange(100))
    assert not torch.equal(rows[:100], rows[100:])
    batch = next(iter(batches(scans, options, seeded())))
    assert torch.equal(batch["x"], scans.x[batch["row"]])


def test_weights_learned_on_clean_rows_tell_wrong_labels():
    """Smoke, fixed seed: 12 visits of each row."""
    options = NoisyLabelOptions(steps=260, eval_every=260, hidden=64, table_lr=0.1)
    task = make_task(options, 7)
    for method in ("instance_table", "meta_weight_net"):
        assert run_method(method, task, options, 7)["weight_auc"] > 0.85, method


def test_methods_share_network_and_order_of_rows():
    """Where weights may not move yet, learned ones are plain training bit for bit."""
    options = NoisyLabelOptions(steps=6, warm_up=5, eval_every=1, table_lr=0.0, net_lr=0.0)
    task = make_task(options, 0)
    plain, table, net = (
        run_method(method, task, options, 0)
        for method in ("uniform", "instance_table", "meta_weight_net")
    )
    scores = lambda found: [score for _, score in found["trace"]]  # noqa: E731
    assert scores(plain) == scores(table) == scores(net)


def test_time_to_the_target():
    trace = [[0.5, 0.2], [1.0, 0.9], [1.5, 0.7]]
    assert seconds_to(trace, 0.9) == 1.0
    assert seconds_to(trace, 0.91) is None


def test_times_are_taken_to_shares_of_the_ceiling_of_the_same_seed():
    def run(dev, trace):
        return {"dev": dev, "trace": trace}

    runs = {
        "uniform": [run(0.7, [[1.0, 0.77], [2.0, 0.7]]), run(0.3, [[1.0, 0.3]])],
        "ceiling": [run(0.8, [[0.5, 0.6], [0.7, 0.8]]), run(0.6, [[0.4, 0.6]])],
    }
    _take_times(runs, (0.95, 1.0))
    assert all("trace" not in one for found in runs.values() for one in found)
    first = runs["uniform"][0]["reached"]
    assert [one["share"] for one in first] == [0.95, 1.0]
    assert [one["dev"] for one in first] == pytest.approx([0.76, 0.8])
    assert [(one["seconds"], one["at_the_end"]) for one in first] == [(1.0, False), (None, False)]
    assert _time_cell(runs["uniform"], 0) == "1.00 s (1 of 2; 0)"
    assert _time_cell(runs["uniform"], 1) == "not reached"
    assert _time_cell(runs["ceiling"], 1) == "0.55 s (2 of 2; 2)"


@pytest.mark.parametrize("damage", [[], ["--long-tail"]])
def test_the_command(tmp_path, capsys, damage):
    output = tmp_path / "found.json"
    given = ["--seeds", "2", "--steps", "4", "--eval-every", "2", "--warm-up", "1"]
    assert main([*damage, *given, "--hidden", "8", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert report["seeds"] == [0, 1]
    assert report["command"].startswith("python -m recipes.problems.noisy_labels ")
    assert report["environment"]["threads"] == 1
    table = capsys.readouterr().out
    expected = set(TITLES) - {"small_loss" if damage else "inverse_frequency"}
    assert set(report["rows"]) == expected
    for name, runs in report["runs"].items():
        assert TITLES[name] in table
        assert [run["seed"] for run in runs] == [0, 1]
        mean = np.mean([run["test"] for run in runs])
        assert report["rows"][name]["test"]["mean"] == pytest.approx(mean, rel=1e-5)
        assert ("tail_weight" in runs[0]) == bool(damage)


def test_options_that_cannot_be_used_end_in_one_line(capsys):
    assert main(["--wrong-share", "1.5"]) == 2
    message = capsys.readouterr().err
    assert "--wrong-share" in message
    assert "1.5" in message
    assert main(["--methods", "small_loss", "--long-tail"]) == 2
    assert "inverse_frequency" in capsys.readouterr().err
    with pytest.raises(OptionError, match="--eval-every"):
        NoisyLabelOptions(eval_every=0)


def test_joined_rows():
    splits = read_splits(seeded())
    both = joined(splits.meta, splits.dev)
    assert len(both) == 300
    assert torch.equal(both.source[100:], splits.dev.source)
