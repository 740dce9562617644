from __future__ import annotations

import math
from inspect import unwrap

import pytest
import torch

from prm.aggregations import mean, minimum
from prm.losses import outcome_loss, pair_loss, step_cross_entropy, step_squared_error
from prm.scoring import solution_scores, step_probs
from tests.prm.tiny import FORWARD_MODE

NAN = math.nan


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 2, generator=generator, dtype=torch.float64).mul(3).requires_grad_()


LABELS = torch.tensor([[1, 0, 0.25, NAN], [NAN, 1, 1, 0], [0, NAN, 0.5, 1]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()


def test_step_cross_entropy_equals_torch_s_and_is_averaged_per_example(logits):
    losses = step_cross_entropy(logits, LABELS, MASK)
    for row in range(3):
        terms = [
            torch.nn.functional.cross_entropy(
                logits[row, step],
                torch.tensor([label, 1 - label], dtype=torch.float64),
            )
            for step, label in enumerate(LABELS[row].tolist())
            if MASK[row, step] and not math.isnan(label)
        ]
        torch.testing.assert_close(losses[row], torch.stack(terms).mean())


def test_over_the_vocabulary_log_probabilities_are_taken_as_they_are(logits):
    log_probs = (logits - 5).detach()
    losses = step_cross_entropy(log_probs, LABELS, MASK, full_vocab=True)
    for row in range(3):
        terms = [
            -label * log_probs[row, step, 0] - (1 - label) * log_probs[row, step, 1]
            for step, label in enumerate(LABELS[row].tolist())
            if MASK[row, step] and not math.isnan(label)
        ]
        torch.testing.assert_close(losses[row], sum(terms) / len(terms))
    assert torch.autograd.gradcheck(
        lambda z: step_cross_entropy(z, LABELS, MASK, full_vocab=True), logits
    )


def test_step_squared_error_by_hand():
    scores = torch.tensor([[0.5, 0.9, NAN], [0.2, 0.4, 0.6]], requires_grad=True)
    labels = torch.tensor([[0.25, 1.0, 1.0], [NAN, 0.0, NAN]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    losses = step_squared_error(scores, labels, mask)
    torch.testing.assert_close(losses, torch.tensor([(0.0625 + 0.01) / 2, 0.16]))
    (gradient,) = torch.autograd.grad(losses.sum(), scores)
    torch.testing.assert_close(gradient, torch.tensor([[0.25, -0.1, 0.0], [0.0, 0.8, 0.0]]))
    unlabelled = step_squared_error(scores, torch.full_like(labels, NAN), mask)
    assert unlabelled.tolist() == [0.0, 0.0]


def test_step_cross_entropy_by_hand():
    logits = torch.tensor([[[2.0, 2.0], [0.0, math.log(3.0)]]])
    losses = step_cross_entropy(logits, torch.tensor([[1.0, 0.0]]), torch.ones(1, 2).bool())
    torch.testing.assert_close(losses, torch.tensor([(math.log(2) - math.log(3 / 4)) / 2]))


@FORWARD_MODE
def test_derivatives(logits):
    assert torch.autograd.gradcheck(
        lambda z: step_cross_entropy(z, LABELS, MASK), logits, check_forward_ad=True
    )
    assert torch.autograd.gradgradcheck(lambda z: step_cross_entropy(z, LABELS, MASK), logits)
    (gradient,) = torch.autograd.grad(step_cross_entropy(logits, LABELS, MASK).sum(), logits)
    assert (gradient[~MASK | LABELS.isnan()] == 0).all()


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[[1e4, -1e4], [-1e4, 1e4]]], requires_grad=True)
    losses = step_cross_entropy(logits, torch.tensor([[0.0, 0.0]]), torch.ones(1, 2).bool())
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.tolist() == [1e4]
    assert gradient.tolist() == [[[0.5, -0.5], [0.0, 0.0]]]


def test_an_example_without_labels_has_no_loss_and_no_gradient():
    logits = torch.full((1, 2, 2), NAN, requires_grad=True)
    losses = step_cross_entropy(logits, torch.tensor([[NAN, 1.0]]), torch.tensor([[True, False]]))
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.tolist() == [0.0]
    assert gradient.tolist() == [[[0.0, 0.0], [0.0, 0.0]]]


def test_outcome_loss_by_hand():
    scores = torch.tensor([[0.75, 0.5], [0.75, 0.5]])
    correct = torch.tensor([1.0, 0.0])
    assert outcome_loss(scores, correct, "+").tolist() == [0.0625, 0.5625]
    assert outcome_loss(scores[:, 0], correct, "+").tolist() == [0.0625, 0.5625]
    assert outcome_loss(scores, correct, "both").tolist() == [0.0625, 0.25]
    unknown = torch.tensor([NAN, 0.0])
    for target in ("+", "both"):
        assert outcome_loss(scores, unknown, target).isnan().tolist() == [True, False]


@FORWARD_MODE
@pytest.mark.parametrize("target", ["+", "both"])
@pytest.mark.parametrize("how", [mean, minimum])
def test_outcome_loss_derivatives(logits, target, how):
    correct = torch.tensor([1.0, 0.0, 1.0])

    def loss(z):
        return outcome_loss(solution_scores(z, MASK, how), correct, target)

    assert torch.autograd.gradcheck(loss, logits, check_forward_ad=True)


def test_targets_coincide_for_two_way_means_only(logits):
    correct = torch.tensor([1.0, 0.0, 0.0])

    def losses(how, full_vocab=False):
        scores = solution_scores(logits, MASK, how, full_vocab=full_vocab)
        return [outcome_loss(scores, correct, target) for target in ("+", "both")]

    torch.testing.assert_close(*losses(mean))
    for plus, both in (losses(minimum), losses(mean, full_vocab=True)):
        torch.testing.assert_close(plus[0], both[0])
        assert ((plus - both).abs()[1:] > 1e-3).all()


def test_step_probs(logits):
    torch.testing.assert_close(step_probs(logits), logits.softmax(-1))
    torch.testing.assert_close(
        step_probs(logits.log_softmax(-1), full_vocab=True), logits.softmax(-1)
    )
    extreme = torch.tensor([[[1e4, -1e4]]])
    assert step_probs(extreme)[0, 0].tolist() == [1.0, 0.0]


def test_shapes_and_targets_are_checked():
    with pytest.raises(ValueError, match=r"found \(2, 3\) and \(2,\)"):
        outcome_loss(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match='"both", found \\[batch\\]; use'):
        outcome_loss(torch.zeros(2), torch.zeros(2), "both")
    with pytest.raises(ValueError, match="found '-'"):
        unwrap(outcome_loss)(torch.zeros(2), torch.zeros(2), "-")  # without type checks of tests


def test_pair_loss_equals_a_loop_over_pairs():
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(9, generator=generator, dtype=torch.float64, requires_grad=True)
    correct = torch.tensor([1.0, 0, 0, 1, 1, 0, 1, 1, 0])
    group = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3])  # group 2 has no wrong, 3 no right one
    pairs = [(0, 1), (0, 2), (3, 5), (4, 5)]
    expected = sum((scores[i] - scores[j] - 1) ** 2 for i, j in pairs) / len(pairs)
    torch.testing.assert_close(pair_loss(scores, correct, group), expected)
    assert torch.autograd.gradcheck(lambda s: pair_loss(s, correct, group), (scores,))


def test_pair_loss_ignores_a_shift_of_a_question():
    scores = torch.tensor([0.9, 0.2, 0.5, 0.4], dtype=torch.float64)
    correct, group = torch.tensor([1.0, 0, 1, 0]), torch.tensor([0, 0, 1, 1])
    shifted = scores + torch.tensor([0.05, 0.05, -0.3, -0.3], dtype=torch.float64)
    torch.testing.assert_close(
        pair_loss(scores, correct, group), pair_loss(shifted, correct, group)
    )
    perfect = torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert float(pair_loss(perfect, correct, group)) == 0.0


def test_pair_loss_without_a_pair_is_refused():
    with pytest.raises(ValueError, match="both a right and a wrong candidate"):
        pair_loss(torch.rand(4), torch.tensor([1.0, 1, 0, 0]), torch.tensor([0, 0, 1, 1]))
