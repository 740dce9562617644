"""When a lower pass keeps the graph of its loss for a product: ``LossGraph``."""

from __future__ import annotations

from collections.abc import Sequence

from bilevel import tree
from bilevel.lower.ghost.origin import tensors_in
from bilevel.problem import Batch, Params

# Entries of θ and the batches of a window up to which graphs are kept. With activations of 32 times
# as many entries they take 64 MiB in float32.
_SMALL = 1 << 19
_SMALL_PARAMS = 1 << 16


def is_small(params: Params, batches: Sequence[Sequence[Batch]]) -> bool:
    """Return whether the graphs of all lower passes of a window may be kept.

    On models this small, starting operations costs more than their arithmetic, and the pass that
    a product would run again is half of them.

    Args:
        params: θ.
        batches: The micro-batches of the steps whose graphs would be kept. A batch without a tensor
            says nothing about the size of what the loss computes with.
    """
    entries = sum(leaf.numel() for leaf in tree.leaves(params))
    if entries > _SMALL_PARAMS:
        return False
    total = 0
    for micro_batches in batches:
        for batch in micro_batches:
            sizes = [leaf.numel() for leaf in tensors_in(batch)]
            total += entries + sum(sizes)
            if not sizes or total > _SMALL:
                return False
    return True
