"""Kernels that operations start on a CUDA device, counted on the pretend one.

An elementwise operation, a reduction and a copy are one kernel; a view and an empty tensor none.
What takes lists of tensors is counted as torch's multi-tensor kernels cut them
(``aten/src/ATen/native/cuda/MultiTensorApply.cuh``): stretches of 65,536 entries, at most 320 of
them, and at most ``MOST_TENSORS`` tensors of each list, in one kernel.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from tests.accelerator import NAME, Accelerator, Pretended, _cause, tensors_of

STRETCH, MOST_STRETCHES = 65_536, 320
MOST_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
"""By the number of lists."""

JOINED_AT_ONCE = 128
"""Tensors that one kernel of ``torch.cat`` takes (``Shape.cu``)."""

FREE = ("empty", "new_empty", "detach", "lift_fresh", "_unsafe_view", "set_", "alias", "squeeze_")


def multi_tensor(sizes: Sequence[int], lists: int) -> int:
    """Return the kernels of an operation on so many lists of tensors of these sizes."""
    kernels = stretches = tensors = 0
    for index, size in enumerate(sizes):
        tensors += 1
        pieces = math.ceil(size / STRETCH)
        for piece in range(pieces):
            stretches += 1
            full = stretches == MOST_STRETCHES
            whole = piece == pieces - 1
            if full or (whole and (tensors == MOST_TENSORS[lists] or index == len(sizes) - 1)):
                kernels += 1
                stretches = 0
                tensors = 0 if whole else 1
    return kernels


def kernels(func: Any, args: Any, times: int = 1) -> int:
    """Return the kernels of an operation, whose tensors stand for some so many times as large."""
    name = func.overloadpacket.__name__
    if func.is_view or name.startswith(FREE):
        return 0
    if name.startswith(("_foreach", "_fused")):
        lists = [one for one in args if isinstance(one, (list, tuple)) and one]
        if len(lists) > 1:  # The counts of an optimizer's steps are read, not computed on.
            lists = [one for one in lists if one[0].dim()]
        sizes = [times * tensor.numel() for tensor in lists[0]]
        out = 0 if name.endswith("_") else 1
        if name == "_foreach_norm":  # and a kernel that adds up the stretches of each tensor
            return multi_tensor(sizes, 1) + math.ceil(len(sizes) / MOST_TENSORS[1])
        return multi_tensor(sizes, len(lists) + out)
    if name in ("cat", "stack"):
        return math.ceil(len(args[0]) / JOINED_AT_ONCE)
    return 1


class Launches(Accelerator):
    """Counts kernels by the place in the project that starts them, beside what it notes.

    Args:
        times: What sizes are multiplied by, where kernels depend on them.
    """

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.times = times
        self.launched: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        taken = (*args, *(kwargs or {}).values())
        there = any(isinstance(tensor, Pretended) for tensor in tensors_of(taken))
        made = (kwargs or {}).get("device")
        if there or (made is not None and torch.device(made).type == NAME):
            place, _ = _cause(sys._getframe(1))
            self.launched[place] += kernels(func, args, self.times)
        return super().__torch_dispatch__(func, types, args, kwargs)
