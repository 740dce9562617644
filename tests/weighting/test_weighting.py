"""Weighting: bounds, tables, net, features, storage."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.tiny_task import FORWARD_MODE
from weighting import (
    Clip,
    DomainTable,
    InstanceNet,
    InstanceTable,
    LeakyReLU,
    Sigmoid,
    Softplus,
    Unbounded,
    batch_mean_one,
    effective_sample_size,
    example_features,
    feature_count,
    fraction_at_bound,
    load_weighting,
    mean_one_over,
    row_index,
    save_weighting,
    step_features,
)

BOUNDS = [Clip(0.0, 2.0), Clip(-1.0, 3.0, recover=False), Sigmoid(2.0), Softplus(),
          LeakyReLU(0.01), LeakyReLU(0.0), Unbounded()]  # fmt: skip


@pytest.mark.parametrize("bound", BOUNDS, ids=repr)
def test_bound_stays_in_its_range_and_inverts(bound):
    raw = torch.linspace(-30, 30, 601, dtype=torch.float64)
    weights = bound(raw)
    lo, hi = bound.range
    assert ((weights >= lo) & (weights <= hi)).all()
    for weight in (0.25, 1.0, 1.5):
        assert float(bound(torch.tensor(bound.raw(weight), dtype=torch.float64))) == pytest.approx(
            weight, abs=1e-12
        )


@pytest.mark.parametrize("bound", BOUNDS, ids=repr)
def test_bound_gradient_equals_central_differences_inside(bound):
    raw = torch.tensor([0.3, 0.9, 1.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(bound, (raw,))


@FORWARD_MODE
def test_clip_at_the_edge():
    raw = torch.tensor([2.5, 2.5, -0.5, -0.5, 1.0], requires_grad=True)
    grad = torch.tensor([-1.0, 1.0, 1.0, -1.0, 3.0])
    (recovering,) = torch.autograd.grad(Clip(0.0, 2.0)(raw), raw, grad)
    assert torch.equal(recovering, grad)
    assert torch.equal(torch.func.jvp(Clip(0.0, 2.0), (raw,), (grad,))[1], grad)
    (exact,) = torch.autograd.grad(Clip(0.0, 2.0, recover=False)(raw), raw, grad)
    assert exact.tolist() == [0.0, 0.0, 0.0, 0.0, 3.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clip(2.0, 0.0), "lo=2.0, hi=0.0"),
        (lambda: Sigmoid(-1.0), "found -1.0"),
        (lambda: LeakyReLU(1.0), "found 1.0"),
        (lambda: InstanceTable(3, prior=2.5), "between 0 and 2; found the prior weight 2.5"),
        (lambda: InstanceTable(0), "size >= 1; found 0"),
        (lambda: InstanceTable(3, normalise="sum"), "found 'sum'"),  # type: ignore[arg-type]
        (lambda: InstanceNet(2, prior=2.0), "found the prior weight 2"),
        (lambda: InstanceNet(2, hidden=0), "hidden >= 1; found 0"),
        (lambda: DomainTable(0), "size >= 1; found 0"),
    ],
)
def test_impossible_configurations_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_table_starts_at_the_prior_and_gathers_rows():
    table = InstanceTable(4, prior=1.0, bound=Clip(0.0, 2.0), normalise="none")
    params = table.init()
    index = torch.tensor([3, 0, 3])
    assert table.weights(params, index).tolist() == [1.0, 1.0, 1.0]
    params["deviation"] = torch.tensor([-2.0, 0.0, 0.5, 0.25])
    assert table.weights(params, index).tolist() == [1.25, 0.0, 1.25]
    assert table.raw_weights(params).tolist() == [-1.0, 1.0, 1.5, 1.25]


def test_batch_normalisation_has_mean_one_and_cancels_the_common_signal():
    raw = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64, requires_grad=True)
    weights = batch_mean_one(raw)
    assert float(weights.detach().mean()) == pytest.approx(1.0, abs=1e-15)
    (grad,) = torch.autograd.grad(weights, raw, torch.full((3,), 7.0, dtype=torch.float64))
    torch.testing.assert_close(grad, torch.zeros(3, dtype=torch.float64), atol=1e-15, rtol=0)
    assert torch.autograd.gradcheck(batch_mean_one, (raw,))


@pytest.mark.parametrize("normalise", ["batch", "table"])
def test_only_visited_rows_get_a_gradient(normalise):
    table = InstanceTable(5, normalise=normalise)
    deviation = torch.tensor([0.1, -0.2, 0.3, 0.4, -0.5], requires_grad=True)
    weights = table.weights({"deviation": deviation}, torch.tensor([1, 3]))
    (grad,) = torch.autograd.grad((weights * torch.tensor([1.0, 2.0])).sum(), deviation)
    assert (grad != 0).tolist() == [False, True, False, True, False]


def test_table_normalisation_uses_the_mean_of_all_rows():
    table = InstanceTable(3, normalise="table")
    params = {"deviation": torch.tensor([-1.0, 0.0, 0.5])}
    # weights 0, 1, 1.5: mean 5/6
    torch.testing.assert_close(
        table.weights(params, torch.tensor([2])), torch.tensor([1.5 * 6 / 5])
    )
    torch.testing.assert_close(table.all_weights(params), torch.tensor([0.0, 1.2, 1.8]))


def test_normalising_a_batch_of_one_or_without_a_mean_is_refused():
    with pytest.raises(ValueError, match="at least two examples"):
        batch_mean_one(torch.ones(1))
    with pytest.raises(ValueError, match="mean is 0"):
        batch_mean_one(torch.tensor([-1.0, 1.0]))
    with pytest.raises(ValueError, match="mean over the table is 0"):
        mean_one_over(torch.zeros(2), torch.zeros(4))


def test_a_batch_in_which_no_example_has_a_part_stays_so():
    raw = torch.zeros(4, requires_grad=True)
    weights = batch_mean_one(raw)
    assert weights.tolist() == [0.0] * 4
    (grad,) = torch.autograd.grad(weights, raw, torch.arange(4.0))
    assert grad.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_domain_table_follows_its_formula():
    table = DomainTable(3)
    raw = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64, requires_grad=True)
    soft = [math.log1p(math.exp(value)) for value in (0.0, 1.0, -2.0)]
    expected = [3 * value / sum(soft) for value in soft]
    weights = table.weights({"raw": raw}, torch.tensor([2, 0, 1, 1]))
    torch.testing.assert_close(
        weights, torch.tensor([expected[i] for i in (2, 0, 1, 1)], dtype=torch.float64)
    )
    assert torch.autograd.gradcheck(lambda r: table.all_weights({"raw": r}), (raw,))
    assert table.all_weights(table.init()).tolist() == [1.0, 1.0, 1.0]


def test_net_starts_at_the_prior_and_matches_a_written_out_network():
    net = InstanceNet(features=3, hidden=4, layers=2, centre=False, normalise=False)
    generator = torch.Generator().manual_seed(0)
    params = net.init(generator)
    x = torch.randn(5, 6, 3, generator=generator)
    mask = torch.rand(5, 6, generator=generator) > 0.3
    mask[:, 0] = True
    assert net.weights(params, x, mask).tolist() == [1.0] * 5
    params["out.weight"] = torch.randn(1, 4, generator=generator)
    weights = net.weights(params, x, mask)
    for row in range(5):
        outputs = []
        for step in range(6):
            if mask[row, step]:
                h = x[row, step]
                for layer in range(2):
                    h = params[f"hidden.{layer}.weight"] @ h + params[f"hidden.{layer}.bias"]
                    h = torch.where(h > 0, h, 0.01 * h)
                outputs.append(float(params["out.weight"] @ h))
        expected = 2 / (1 + math.exp(-sum(outputs) / len(outputs)))
        assert float(weights[row]) == pytest.approx(expected, rel=1e-5)


def test_centred_net_keeps_the_batch_around_the_prior():
    net = InstanceNet(features=2, normalise=False)
    params = net.init(torch.Generator().manual_seed(1))
    params["out.weight"] = torch.full((1, 10), 3.0)
    x = torch.rand(8, 4, 2, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(8, 4, dtype=torch.bool)
    logits = torch.logit(net.weights(params, x, mask) / 2)
    assert float(logits.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(logits.std()) > 1e-3


def test_net_ignores_what_stands_in_masked_steps():
    net = InstanceNet(features=2)
    params = net.init(torch.Generator().manual_seed(1))
    params["out.weight"] = torch.ones(1, 10)
    x = torch.rand(3, 4, 2)
    mask = torch.tensor([[True, True, False, False]] * 3)
    changed = x.clone()
    changed[:, 2:] = 100.0
    torch.testing.assert_close(
        net.weights(params, x, mask), net.weights(params, changed, mask), rtol=0, atol=0
    )
    with pytest.raises(ValueError, match="2 features per step; found 3"):
        net.weights(params, torch.rand(3, 4, 3), mask)


def test_step_features_values_and_missing_labels():
    probs = torch.tensor([[0.9, 0.2, 0.5]])
    labels = torch.tensor([[1.0, 1.0, float("nan")]])
    mask = torch.tensor([[True, True, True]])
    names = ("p_plus", "p_minus", "label", "p_label", "loss")
    features, known = step_features(names, probs, labels, mask)
    assert known.tolist() == [[True, True, False]]
    expected = torch.tensor([[0.9, 0.1, 1.0, 0.9, -math.log(0.9)],
                             [0.2, 0.8, 1.0, 0.2, -math.log(0.2)]])  # fmt: skip
    torch.testing.assert_close(features[0, :2], expected)
    assert features.isfinite().all()
    with pytest.raises(ValueError, match="unknown step feature 'entropy'"):
        step_features(("entropy",), probs, labels, mask)


def test_effective_sample_size_and_fraction_at_bound():
    assert effective_sample_size(torch.ones(7)) == pytest.approx(7.0)
    assert effective_sample_size(torch.tensor([1.0, 0.0, 0.0])) == pytest.approx(1.0)
    assert effective_sample_size(torch.tensor([3.0, 1.0])) == pytest.approx(1.6)
    assert effective_sample_size(torch.zeros(2)) == 0.0
    raw = torch.tensor([-1.0, 0.5, 2.5, 1.0])
    assert fraction_at_bound(raw, Clip(0.0, 2.0)) == 0.5
    assert fraction_at_bound(raw, Unbounded()) == 0.0


@pytest.mark.parametrize(
    ("weighting", "ids"),
    [
        (InstanceTable(3, bound=Clip(-1.0, 3.0), normalise="none"), ("a", "b", "ü")),
        (InstanceNet(4, hidden=7, layers=2, bound=Sigmoid(3.0)), ()),
        (DomainTable(2), ("sum", "gap")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_saved_weighting_comes_back_equal(tmp_path, weighting, ids):
    params = {name: torch.randn_like(tensor) for name, tensor in weighting.init().items()}
    save_weighting(tmp_path, weighting, params, ids, {"features": ["loss"]})
    loaded, loaded_params, loaded_ids, extra = load_weighting(tmp_path)
    assert loaded == weighting
    assert loaded_ids == ids
    assert extra == {"features": ["loss"]}
    assert set(loaded_params) == set(params)
    assert all(torch.equal(loaded_params[name], params[name]) for name in params)
    assert not list(tmp_path.glob("*.tmp"))


def test_storage_refuses_what_does_not_fit(tmp_path):
    table = InstanceTable(2)
    with pytest.raises(ValueError, match="has 2 rows but 1 ids"):
        save_weighting(tmp_path / "new", table, table.init(), ("a",))
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="id 'a' occurs in rows 0 and 1"):
        save_weighting(tmp_path / "new", table, table.init(), ("a", "a"))
    with pytest.raises(FileNotFoundError, match=r"config\.json: not found"):
        load_weighting(tmp_path / "new")
    save_weighting(tmp_path, table, table.init(), ("a", "b"))
    config = json.loads((tmp_path / "config.json").read_text())
    config["fields"]["size"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expected parameters"):
        load_weighting(tmp_path)
    config["kind"] = "Table"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="unknown kind 'Table'"):
        load_weighting(tmp_path)
    assert row_index(("x", "y")) == {"x": 0, "y": 1}


def test_projection_of_a_clipped_table_keeps_raw_weights_inside() -> None:
    """Raw weights end up in [lo, hi]; what is inside stays; other bounds project nothing."""
    table = InstanceTable(4, prior=0.5, bound=Clip(-1.0, 3.0))
    params = {"deviation": torch.tensor([-9.0, -1.5, 0.25, 9.0])}
    projected = table.project(params)
    assert table.raw_weights(projected).tolist() == [-1.0, -1.0, 0.75, 3.0]
    free = InstanceTable(4, bound=Sigmoid(2.0))
    assert torch.equal(free.project(params)["deviation"], params["deviation"])


def test_example_features_are_the_same_at_every_step():
    mask = torch.tensor([[True] * 9, [True] * 4 + [False] * 5])
    found = example_features(
        ("domain", "label", "steps", "length"),
        mask,
        length=torch.tensor([100, 10_000]),
        domain=torch.tensor([2, 0]),
        domains=3,
    )
    rows = torch.tensor([[0.0, 0, 1, 1.0, 0.5], [1, 0, 0, math.log10(5), 1.0]])
    torch.testing.assert_close(found, rows[:, None, :].expand(2, 9, 5))
    assert example_features(("label",), mask).shape == (2, 9, 0)


def test_features_are_counted():
    assert feature_count(("label", "p_label", "loss")) == 3
    assert feature_count(("label", "p_label", "loss"), reference=True) == 5
    assert feature_count(("label", "steps", "domain", "length"), reference=True, domains=4) == 7
    with pytest.raises(ValueError, match=r"expected among p_plus, .*, gradient; found 'entropy'"):
        feature_count(("entropy",))
    with pytest.raises(ValueError, match="'domain' needs examples that all name their domain"):
        feature_count(("domain",))
    with pytest.raises(ValueError, match="'length' needs the number of tokens"):
        example_features(("length",), torch.ones(1, 1).bool())
    with pytest.raises(ValueError, match="'domain' needs the domain of each example"):
        example_features(("domain",), torch.ones(1, 1).bool(), domains=2)
