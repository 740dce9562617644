"""Rules: what to do when a torch operation takes a tracked parameter.

A handler has the signature of its torch function after the tracker. It computes the output with
the parameter's value and taps it; or tracks the output, if that is a view, a cast or another
linear map of the parameter alone; or returns ``NotImplemented``, which refuses.

Rules exist for ``linear``, ``matmul``/``mm``/``mv``/``addmm`` with the parameter on the right,
``embedding``, ``layer_norm``, ``rms_norm``, ``group_norm``, ``conv1d/2d/3d``, broadcast ``mul``,
``add``, ``sub``, ``cat``, views, casts and scalar multiples.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from bilevel.lower.ghost import arithmetic, layers

Handler: TypeAlias = Callable[..., Any]


# fmt: off
VIEWS = [
    "t", "transpose", "permute", "movedim", "swapaxes", "swapdims", "reshape", "flatten",
    "unflatten", "unsqueeze", "squeeze", "narrow", "select", "chunk", "split", "unbind",
    "tensor_split", "ravel", "clone", "neg", "view", "view_as", "expand", "expand_as",
    "contiguous", "to", "type", "type_as", "float", "double", "half", "bfloat16",
]
# fmt: on


def _table() -> dict[Any, Handler]:
    """Return torch function -> handler; most functions exist in ``torch`` and as methods."""
    table: dict[Any, Handler] = {
        functional.linear: layers.linear,
        functional.embedding: layers.embedding,
        functional.layer_norm: layers.layer_norm,
        functional.rms_norm: layers.rms_norm,
        functional.group_norm: layers.group_norm,
        Tensor.__getitem__: layers.index,
        Tensor.__matmul__: layers.matmul,
        Tensor.__rsub__: arithmetic.subtract_reversed,
    }
    named: dict[str, Handler] = {
        "addmm": layers.addmm,
        "matmul": layers.matmul,
        "mm": layers.matmul,
        "mv": layers.matmul,
        "layer_norm": layers.layer_norm,
        "rms_norm": layers.rms_norm,
        "mul": arithmetic.multiply,
        "multiply": arithmetic.multiply,
        "div": arithmetic.divide,
        "true_divide": arithmetic.divide,
        "add": arithmetic.add,
        "sub": arithmetic.subtract,
        "cat": arithmetic.concatenate,
        "concat": arithmetic.concatenate,
    }
    for name, handler in named.items():
        table |= dict.fromkeys(_functions(name), handler)
    for name in ("conv1d", "conv2d", "conv3d"):
        for function in _functions(name):
            table[function] = partial(layers.convolution, convolve=function)
    getters = [getattr(Tensor, name).__get__ for name in ("T", "mT")]
    for function in (*getters, *(function for name in VIEWS for function in _functions(name))):
        table[function] = partial(arithmetic.view, function=function)
    return table


def _functions(name: str) -> list[Any]:
    """Return the function of that name in torch and the method; ``torch.float`` is a dtype."""
    candidates = [getattr(owner, name, None) for owner in (torch, Tensor)]
    return [function for function in candidates if callable(function)]


OPERATIONS = _table()
