"""The digit scans of scikit-learn, split, with corrupted labels or with rare classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

CLASSES, PIXELS = 10, 64
META_PER_CLASS = 10
DEV, TEST = 200, 397


@dataclass(frozen=True)
class Scans:
    """A set of scans.

    Attributes:
        x: The pixels in [0, 1], [rows, 64].
        y: The labels, which may be wrong, int64 [rows].
        true: The digits in the pictures, int64 [rows].
        source: The rows of scikit-learn's data set, int64 [rows].
    """

    x: Tensor
    y: Tensor
    true: Tensor
    source: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows: Tensor) -> Scans:
        return Scans(self.x[rows], self.y[rows], self.true[rows], self.source[rows])

    @property
    def clean(self) -> Tensor:
        """Return which labels are right, bool [rows]."""
        return self.y == self.true


class Splits(NamedTuple):
    """Disjoint sets of scans with right labels and classes of about the same size."""

    train: Scans
    meta: Scans
    dev: Scans
    test: Scans


def read_splits(generator: torch.Generator) -> Splits:
    """Return a random split: 100 meta scans, 10 per digit, 200 dev, 397 test, the rest training.

    Raises:
        ModuleNotFoundError: Scikit-learn, which contains the scans, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digit scans are inside scikit-learn, which is not installed; install it with: "
            "pip install 'bilevel-prm[demo]'"
        ) from error
    bunch: Any = load_digits()
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)
    pixels = torch.as_tensor(bunch.data, dtype=torch.float32) / 16
    scans = Scans(pixels, labels, labels, torch.arange(len(labels)))
    order = torch.randperm(len(labels), generator=generator)
    rank = _rank_in_class(labels[order])
    meta, rest = order[rank < META_PER_CLASS], order[rank >= META_PER_CLASS]
    dev, test, train = rest.split([DEV, TEST, len(rest) - DEV - TEST])
    return Splits(scans[train], scans[meta], scans[dev], scans[test])


def with_wrong_labels(scans: Scans, share: float, generator: torch.Generator) -> Scans:
    """Give ``round(share * rows)`` random rows one of the nine other labels, chosen uniformly."""
    spoilt = torch.randperm(len(scans), generator=generator)[: round(share * len(scans))]
    shift = torch.randint(1, CLASSES, (len(spoilt),), generator=generator)
    labels = scans.y.clone()
    labels[spoilt] = (labels[spoilt] + shift) % CLASSES
    return replace(scans, y=labels)


def with_mistaken_classes(scans: Scans, share: float, generator: torch.Generator) -> Scans:
    """Give a share of the rows of five random classes the label of another class each.

    The five are mistaken for each other in a cycle, as by an annotator with another key:
    ``round(share * rows of the class)`` of each, so that with a share above one half most labels of
    these classes are wrong, and consistently so.
    """
    mistaken = torch.randperm(CLASSES, generator=generator)[: CLASSES // 2]
    labels = scans.y.clone()
    for digit, other in zip(mistaken.tolist(), mistaken.roll(1).tolist(), strict=True):
        rows = (scans.y == digit).nonzero().squeeze(1)
        order = torch.randperm(len(rows), generator=generator)
        labels[rows[order[: round(share * len(rows))]]] = other
    return replace(scans, y=labels)


def long_tail(scans: Scans, imbalance: float, generator: torch.Generator) -> tuple[Scans, Tensor]:
    """Remove rows so that the class of rank k of ten keeps ``n · imbalance^(−k/9)``.

    n is the size of the smallest class before. The ranks of the classes are random.

    Returns:
        The remaining rows, and the classes [10] from the largest to the smallest.
    """
    ranked = torch.randperm(CLASSES, generator=generator)
    full = int(torch.bincount(scans.y, minlength=CLASSES).min())
    ranks = torch.empty_like(ranked).scatter_(0, ranked, torch.arange(CLASSES)).double()
    kept = (full * imbalance ** (-ranks / (CLASSES - 1))).round().long()
    order = torch.randperm(len(scans), generator=generator)
    scans = scans[order]
    return scans[_rank_in_class(scans.y) < kept[scans.y]], ranked


def joined(first: Scans, second: Scans) -> Scans:
    """Return the rows of both."""
    pairs = zip(vars(first).values(), vars(second).values(), strict=True)
    return Scans(*(torch.cat(pair) for pair in pairs))


def _rank_in_class(labels: Tensor) -> Tensor:
    """Return the number of earlier rows with the same label, [rows]."""
    same = torch.nn.functional.one_hot(labels, CLASSES).cumsum(0)
    return same.gather(1, labels[:, None]).squeeze(1) - 1
