"""Memory that may be written to."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel import tree
from bilevel.tree import TreeT


def is_dense(leaf: Tensor) -> bool:
    """Return whether the entries of a tensor lie in one stretch of memory, in any order."""
    return leaf.stride() == torch.empty_like(leaf, device="meta").stride()


@torch.no_grad()
def owned(values: TreeT) -> TreeT:
    """Return the same values in memory that no other entry of them uses.

    Autograd may return one tensor as the gradient of two leaves, or one number for all entries of a
    leaf. Those are copied, the others are not.
    """
    seen: set[int] = set()

    def alone(leaf: Tensor) -> Tensor:
        where = leaf.untyped_storage().data_ptr()
        if is_dense(leaf) and where not in seen:
            seen.add(where)
            return leaf
        return leaf.clone(memory_format=torch.contiguous_format)

    mapped: TreeT = tree.map(alone, values)
    return mapped


def shared_leaves(params: TreeT) -> tuple[str, str] | None:
    """Return the paths of two leaves that share memory, None if no two do.

    A leaf whose entries share memory is one that shares it with itself.
    """
    seen: dict[tuple[torch.device, int], str] = {}
    for name, leaf in tree.flatten(params).items():
        if not leaf.numel() or leaf.is_meta:
            continue
        earlier = seen.setdefault((leaf.device, leaf.data_ptr()), name)
        if earlier != name or torch._debug_has_internal_overlap(leaf) == 1:
            return earlier, name
    return None
