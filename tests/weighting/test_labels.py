"""Learned labels: what they start from, how they move, what is read of a table of them."""

from __future__ import annotations

import math

import pytest
import torch

from weighting import Clip, Sigmoid, StepLabels, Weighting, load_weighting, save_weighting

NONE = float("nan")
GIVEN = torch.tensor([[1.0, 0.0, 0.25], [0.0, NONE, NONE]], dtype=torch.float64)
BATCH = {"index": torch.tensor([2, 0]), "labels": GIVEN}
TABLE = StepLabels(3, 4, trust=0.8)
PRIOR = torch.tensor([[0.8, 0.2, 0.35], [0.2, NONE, NONE]], dtype=torch.float64)


def moved() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"deviation": torch.randn(3, 4, generator=generator, dtype=torch.float64)}


def test_labels_start_at_their_prior():
    """c for "+", 1 − c for "-", and 1/2 + (2c − 1)(y − 1/2) in between."""
    assert isinstance(TABLE, Weighting)
    start = {name: leaf.double() for name, leaf in TABLE.init().items()}
    assert start["deviation"].shape == (3, 4)
    torch.testing.assert_close(TABLE.labels(start, BATCH), PRIOR, equal_nan=True)
    assert TABLE.start == 0.8
    agreement, support = TABLE.file_weights(start, [BATCH])
    torch.testing.assert_close(agreement, torch.ones(2, dtype=torch.float64))
    assert support.tolist() == [0.0, 0.0]


def test_labels_are_the_logistic_function_of_prior_and_deviation():
    params = moved()
    rows = params["deviation"][torch.tensor([2, 0]), :3]
    odds = PRIOR / (1 - PRIOR) * rows.exp()
    expected = odds / (1 + odds)
    torch.testing.assert_close(TABLE.labels(params, BATCH), expected, equal_nan=True)
    agreement, support = TABLE.file_weights(params, [BATCH])
    away = (expected - PRIOR).abs()
    torch.testing.assert_close(agreement, 1 - torch.stack([away[0].mean(), away[1, 0]]))
    by_hand = torch.stack([(rows[0] * torch.tensor([1.0, -1.0, -0.5])).mean(), -rows[1, 0]])
    torch.testing.assert_close(support, by_hand)


def test_derivative_is_q_times_one_minus_q_where_there_is_a_label():
    """A step without one, a step that does not exist and a row not in the batch have none."""
    params = {name: leaf.requires_grad_() for name, leaf in moved().items()}
    labels = TABLE.labels(params, BATCH)
    (grad,) = torch.autograd.grad(labels.nansum(), [params["deviation"]])
    q = labels.detach()
    expected = torch.zeros(3, 4, dtype=torch.float64)
    expected[2, :3] = q[0] * (1 - q[0])
    expected[0, 0] = q[1, 0] * (1 - q[1, 0])
    torch.testing.assert_close(grad, expected)


def test_a_label_is_turned_over_and_goes_no_further():
    turn = 2 * math.log(4)
    assert TABLE.turn == pytest.approx(turn)
    far = {"deviation": torch.full((3, 4), -9.0, dtype=torch.float64)}
    near = TABLE.project(far)
    assert TABLE.project(near)["deviation"].tolist() == near["deviation"].tolist()
    plus = {"index": torch.tensor([1]), "labels": torch.tensor([[1.0]], dtype=torch.float64)}
    assert float(TABLE.labels(near, plus)) == pytest.approx(0.2)
    agreement = TABLE.batch_weights(near, plus)
    assert float(agreement) == pytest.approx(0.4)
    assert TABLE.share_at_bound(near, agreement) == 1.0
    assert TABLE.share_at_bound(near, torch.tensor([0.4, 0.7, 1.0, 1.0])) == 0.25


def test_figures_of_the_log():
    assert TABLE.moved(TABLE.init()) == {"labels/moved": 0.0, "labels/most": 0.0}
    params = {"deviation": torch.tensor([[0.0, -3.0], [1.0, 0.0]])}
    assert TABLE.moved(params) == {"labels/moved": 2.0, "labels/most": 3.0}


def test_saved_and_loaded_bit_for_bit(tmp_path):
    params = {"deviation": torch.randn(3, 4)}
    save_weighting(tmp_path, TABLE, params, ["a", "b", "c"])
    weighting, found, names, _ = load_weighting(tmp_path)
    assert weighting == TABLE
    assert names == ("a", "b", "c")
    assert torch.equal(found["deviation"], params["deviation"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 0}, "size >= 1; found 0"),
        ({"steps": 0}, "steps >= 1; found 0"),
        ({"trust": 0.5}, "above 0.5 and below 1; found 0.5"),
        ({"trust": 1.0}, "above 0.5 and below 1; found 1.0"),
        ({"bound": Clip()}, "needs the bound Sigmoid"),
        ({"bound": Sigmoid(2.0)}, "needs the bound Sigmoid"),
    ],
)
def test_what_is_no_table_of_labels_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        StepLabels(**{"size": 3, "steps": 4, **given})


def test_examples_of_more_steps_than_the_table_are_refused():
    batch = {"index": torch.tensor([0]), "labels": torch.ones(1, 5)}
    with pytest.raises(ValueError, match=r"labels for 4 steps; found .* up to 5"):
        TABLE.labels(TABLE.init(), batch)
