"""Whether the gradient that is weighted per example is autograd's own, measured.

The rules assume that an example's loss depends on the rows of that example alone. Batch statistics
and contrastive terms break this, and so does a dimension as long as the batch that is not that of
the examples. So the gradients of both kinds are compared, at parameters next to the current ones
(where no gate is exactly 0) and with weights that are all different: with equal ones they agree
even if examples influence each other.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import tree
from bilevel.tree import Tree

# What was found, by shapes: None where the gradients agree, or why the rules cannot be used.
Verdicts: TypeAlias = dict[Hashable, str | None]

# So many different shapes are measured on their own. From then on shapes are measured if other
# sizes than before are equal to each other, for a batch of texts has a new length every time, and
# a measurement takes as long as four passes.
SHAPES = 4

_GOLDEN = 0.6180339887498949
_OFF_CPU_EPS = 2.0**-10  # TF32, which other devices may compute float32 in


def known(verdicts: Verdicts, batch_size: int, shapes: Sequence[tuple[int, ...]]) -> Hashable:
    """Return the key under which the verdict on these shapes is, or will be.

    Args:
        verdicts: What was found so far.
        batch_size: The number of examples.
        shapes: All shapes that the rules look at.
    """
    exact = hash((batch_size, *shapes))
    if exact in verdicts or len(verdicts) < SHAPES:
        return exact
    ranks = {0: 0, 1: 1, batch_size: 2}
    return tuple(ranks.setdefault(size, len(ranks)) for shape in shapes for size in (*shape, -1))


def uneven(losses: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Return weights in [0.5, 1.5) for these losses, all different and always the same."""
    places = torch.arange(1, len(losses) + 1, dtype=torch.float64) * _GOLDEN
    return (places % 1.0 + 0.5).to(losses)


@torch.no_grad()
def displacement(params: Tree) -> list[Tensor]:
    """Return a step to parameters near these, the same at every call, leaf by leaf.

    torch's generators are not used.
    """
    steps = []
    for number, leaf in enumerate(tree.leaves(params)):
        generator = torch.Generator(leaf.device).manual_seed(number)
        noise = torch.randn(leaf.shape, generator=generator, device=leaf.device)
        size = float(torch.linalg.vector_norm(leaf)) / max(leaf.numel(), 1) ** 0.5
        steps.append(((0.1 * size if size > 1e-3 else 0.03) * noise).to(leaf.dtype))
    return steps


def rounding(dtypes: Iterable[torch.dtype], device: torch.device) -> float:
    """Return the machine epsilon of the least precise numbers, float32's at least.

    (Models in float64 have parts that compute in float32.)
    """
    eps = max(torch.finfo(dtype).eps for dtype in (torch.float32, *dtypes))
    return eps if device.type == "cpu" else max(eps, _OFF_CPU_EPS)


@torch.no_grad()
def distance(found: Sequence[Tensor], expected: Sequence[Tensor], eps: float) -> float:
    """Return the relative distance of two lists of tensors; 0 if it is rounding.

    Each is held to its own size, so that a leaf with a small gradient counts, too. NaN if there is
    one in either.
    """
    differences = [tree.norm(one - other) for one, other in zip(found, expected, strict=True)]
    total, apart = float(tree.norm(expected)), float(tree.norm(differences))
    if not math.isfinite(total + apart):
        return math.nan
    relative, floor = min(0.2, 3.0 * eps**0.5), min(0.05, 30.0 * eps) * total
    pairs = zip(differences, expected, strict=True)
    rounded = all(float(d) <= relative * float(tree.norm(leaf)) + floor for d, leaf in pairs)
    return 0.0 if rounded else apart / total if total else math.inf
