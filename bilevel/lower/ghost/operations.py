"""The rules for torch operations that take a tracked parameter.

A handler takes the tracker and then the arguments of its torch function. It computes the output
with the parameter's value and taps it. If the output is a view, a cast or another linear map of the
parameter alone, it tracks the output instead. It returns ``NotImplemented`` for a case without a
rule, which is then an error.

Rules exist for ``linear``, ``matmul``/``mm``/``mv``/``addmm`` with the parameter on the right,
``embedding``, ``layer_norm``, ``rms_norm``, ``group_norm``, ``conv1d/2d/3d``, broadcast ``mul``,
``add``, ``sub`` and ``cat``, all with an operand from the batch. Of constants and parameters the
same operations, and ``stack``, ``where``, ``masked_fill``, views, casts, indices, sums and means,
make images of the parameters, which are used like them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor
from torch.nn import functional

from bilevel.lower.ghost import arithmetic, layers
from bilevel.lower.ghost.mixing import functions

Handler: TypeAlias = Callable[..., Any]


# fmt: off
VIEWS = [
    "t", "transpose", "permute", "movedim", "swapaxes", "swapdims", "reshape", "flatten",
    "unflatten", "unsqueeze", "squeeze", "narrow", "select", "chunk", "split", "unbind",
    "tensor_split", "ravel", "clone", "neg", "view", "view_as", "expand", "expand_as",
    "contiguous", "to", "type", "type_as", "float", "double", "half", "bfloat16",
    "sum", "mean", "flip", "roll", "repeat", "tile", "tril", "triu", "diag", "diagonal",
    "index_select",
]
AFFINE = ["stack", "where", "masked_fill"]
# fmt: on


def _table() -> dict[Any, Handler]:
    """Return the handlers by torch function; most exist both in ``torch`` and as methods."""
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
        table |= dict.fromkeys(functions(name), handler)
    for name in ("conv1d", "conv2d", "conv3d"):
        for function in functions(name):
            table[function] = partial(layers.convolution, convolve=function)
    for function in functions(*AFFINE):
        table[function] = partial(arithmetic.constant_map, function=function)
    getters = [getattr(Tensor, name).__get__ for name in ("T", "mT")]
    for function in (*getters, *functions(*VIEWS)):
        table[function] = partial(arithmetic.view, function=function)
    return table


OPERATIONS = _table()
