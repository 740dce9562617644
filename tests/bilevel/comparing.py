"""How far two results are from each other, and how fast an error falls."""

from __future__ import annotations

import math

import torch

from bilevel import tree


def relative(found, expected) -> float:
    """‖found − expected‖ / ‖expected‖ over all leaves of two trees."""
    return float(tree.norm(tree.axpy(-1.0, expected, found)) / tree.norm(expected))


def same_bits(left, right) -> bool:
    """Whether every leaf of two trees is equal to the last bit."""
    pairs = zip(tree.leaves(left), tree.leaves(right), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def loglog_slope(steps, errors) -> float:
    """Least-squares slope of log error against log step."""
    x, y = ([math.log(value) for value in values] for values in (steps, errors))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    top = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return top / sum((a - mean_x) ** 2 for a in x)
