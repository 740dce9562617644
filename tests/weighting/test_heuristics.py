"""Balanced-Information Score and the kept share, by value."""

from __future__ import annotations

import math

import pytest
import torch

from weighting import balanced_information, confident_labels, keep_best, tolerant_labels

NAN = math.nan


def test_balanced_information_by_hand():
    labels = torch.tensor(
        [
            [0.5, 0.0, 1.0, 0.0],  # p = 1/2, R = 3/4
            [1.0, 1.0, 1.0, 1.0],  # all right: p (1 - p) = 0
            [0.0, 0.0, 0.0, 0.0],  # none right: R = 1
            [0.25, NAN, 0.0, 0.9],  # p = 1/2 of the two that exist and are labelled
        ],
        dtype=torch.float64,
    )
    mask = torch.tensor([[True] * 4] * 3 + [[True, True, True, False]])
    found = balanced_information(labels, mask, alpha=0.05)
    expected = [(0.25 + 0.05) * 0.75, 0.05, 0.05, (0.25 + 0.05) * 0.25]
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
    )
    assert float(balanced_information(labels, mask, alpha=2.0)[1]) == 2.0


def test_balanced_information_against_the_definition():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (50, 6), generator=generator).double() / 4
    lengths = torch.randint(1, 7, (50,), generator=generator)
    mask = torch.arange(6) < lengths[:, None]
    found = balanced_information(labels, mask, alpha=0.1)
    for row, length in enumerate(lengths.tolist()):
        scores = labels[row, :length].tolist()
        positive = [score for score in scores if score > 0]
        share = len(positive) / length
        reliability = sum(positive) / len(positive) if positive else 1.0
        assert float(found[row]) == pytest.approx(
            (share * (1 - share) + 0.1) * reliability, rel=1e-12
        )


def test_examples_without_labels_have_no_score():
    labels = torch.tensor([[NAN, NAN], [1.0, 0.0]])
    found = balanced_information(labels, torch.ones(2, 2, dtype=torch.bool))
    assert found.isnan().tolist() == [True, False]
    with pytest.raises(ValueError, match="positive alpha; found 0"):
        balanced_information(labels, torch.ones(2, 2, dtype=torch.bool), alpha=0.0)


def test_kept_share():
    scores = torch.tensor([3.0, 1.0, 2.0, 3.0, 0.0])
    assert keep_best(scores, 0.2).tolist() == [1, 0, 0, 0, 0]  # of equal ones the first
    assert keep_best(scores, 0.6).tolist() == [1, 0, 1, 1, 0]
    assert keep_best(scores, 0.79).tolist() == [1, 0, 1, 1, 0]
    assert keep_best(scores, 0.01).sum() == 1
    assert keep_best(scores, 1.0).tolist() == [1] * 5
    groups = ["a", "b", "b", "a", "b"]
    assert keep_best(scores, 0.5, groups).tolist() == [1, 0, 1, 0, 0]
    # 0.29 * 100 is 28.999... in floating point
    assert keep_best(torch.arange(100.0), 0.29).sum() == 29


def test_what_cannot_be_ranked_is_refused():
    for share in (0.0, 1.1, NAN):
        with pytest.raises(ValueError, match="share"):
            keep_best(torch.ones(2), share)
    with pytest.raises(ValueError, match="NaN for 1"):
        keep_best(torch.tensor([1.0, NAN]), 0.5)
    with pytest.raises(ValueError, match="2 scores and 1 groups"):
        keep_best(torch.ones(2), 0.5, ["a"])


def test_labels_that_a_model_is_far_from_become_its_scores():
    labels = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.5, NAN])
    scores = torch.tensor([0.75, 0.5, 0.25, 0.375, 0.125, 0.9])
    found = confident_labels(labels, scores, 0.25)
    expected = torch.tensor([1.0, 0.5, 0.0, 0.375, 0.125, NAN])
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(confident_labels(labels[:5], scores[:5], 1.0), labels[:5])
    with pytest.raises(ValueError, match=r"threshold in \[0, 1\]; found 1.5"):
        confident_labels(labels, scores, 1.5)


def test_tolerant_labels_by_hand():
    shares = torch.tensor(
        [
            [0.75, 0.5, 0.375, 0.25, 0.0, 0.25],  # the first failure is step 4, two before it soft
            [0.5, 0.25, 0.125, 1.0, 0.75, 0.25],  # no failure
            [0.0, 1.0, 1.0, 1.0, NAN, NAN],  # fails at once
            [0.25, NAN, 0.9, 0.0, NAN, NAN],  # one step was not sampled, one is surer than SC
        ]
    )
    confidence = torch.tensor([0.75, 0.5, 1.0, 0.75])
    expected = torch.tensor(
        [
            [1.0, 1.0, 0.5, 1 / 3, 0.0, NAN],
            [1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
            [0.0, NAN, NAN, NAN, NAN, NAN],
            [1.0, NAN, 1.0, 0.0, NAN, NAN],
        ]
    )
    torch.testing.assert_close(tolerant_labels(shares, confidence), expected, equal_nan=True)
    hard = tolerant_labels(shares, confidence, 0)
    assert hard[0, :5].tolist() == [1.0, 1.0, 1.0, 1.0, 0.0]
    for wrong in (-1, 0):
        with pytest.raises(ValueError, match=("confidences", "tolerance of 0")[-wrong]):
            tolerant_labels(shares, confidence if wrong else confidence - 1, wrong)
