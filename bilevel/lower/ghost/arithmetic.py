"""Rules for arithmetic with parameters, concatenation, and views of them. See ``operations``."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.lower.ghost.context import Tracked
from bilevel.lower.ghost.elementwise_uses import Broadcast, Concatenated
from bilevel.lower.ghost.tracker import Tracker


def multiply(t: Tracker, input: Any, other: Any) -> Any:
    """Apply ``input · other``, one of which is the parameter."""
    entry, factor = _one_tracked(t, input, other)
    if entry is None:
        return NotImplemented
    if not t.from_batch(factor):
        return t.derive(lambda image: image * factor, entry, tangent=lambda along: along * factor)
    if not _rows_of(factor, entry):
        return NotImplemented
    output = torch.mul(t.value(input), t.value(other))
    return t.tap(output, Broadcast(entry.value.shape), (entry,), factor, (factor,))


def divide(t: Tracker, input: Any, other: Any) -> Any:
    """Apply ``input / other``, the parameter over a constant."""
    entry, divisor = _one_tracked(t, input, other)
    if entry is None or divisor is not other or t.from_batch(divisor):
        return NotImplemented
    return t.derive(lambda image: image / divisor, entry, tangent=lambda along: along / divisor)


def add(t: Tracker, input: Any, other: Any, *, alpha: float = 1) -> Any:
    """Apply ``input + other``, of parameters, or of the parameter and something else."""
    return _shift(t, operator.add, input, other, alpha, sign_of_other=1.0)


def subtract(t: Tracker, input: Any, other: Any, *, alpha: float = 1) -> Any:
    """Apply ``input − other``, of parameters, or of the parameter and something else."""
    return _shift(t, operator.sub, input, other, alpha, sign_of_other=-1.0)


def subtract_reversed(t: Tracker, input: Any, other: Any) -> Any:
    """Apply ``other − input``, for Python's reflected operator."""
    return subtract(t, other, input)


def concatenate(t: Tracker, tensors: Sequence[Tensor], dim: int = 0, **named: Any) -> Any:
    """Apply ``cat`` to the parameter and the examples along a dimension other than the rows."""
    dim = named.get("axis", dim)
    if not t.from_batch(*tensors):
        return t.affine(lambda *pieces: torch.cat(pieces, dim), *tensors)
    dim = dim % tensors[0].dim()
    if dim == 0:
        return NotImplemented
    output = torch.cat([t.value(tensor) for tensor in tensors], dim)
    examples = max((tensor for tensor in tensors if t.from_batch(tensor)), key=t.origin)
    start = 0
    for tensor in tensors:
        entry = t.find(tensor)
        if entry is not None:
            use = Concatenated(dim, start, tensor.shape)
            output = t.tap(output, use, (entry,), examples)
        start += tensor.shape[dim]
    return output


def constant_map(t: Tracker, *args: Any, function: Callable[..., Any], **kwargs: Any) -> Any:
    """Apply an operation that is affine in its tensors of real numbers together."""
    pieces = args[0] if isinstance(args[0], tuple | list) else args
    if t.from_batch(*pieces, *kwargs.values()) or any(t.find(v) for v in kwargs.values()):
        return NotImplemented
    if pieces is args:
        return t.affine(lambda *at: function(*at, **kwargs), *args)
    return t.affine(lambda *at: function(at, *args[1:], **kwargs), *pieces)


def view(t: Tracker, input: Any, *args: Any, function: Callable[..., Any], **kwargs: Any) -> Any:
    """Apply a view, cast or other linear map of the parameter alone."""
    entry = t.find(input)
    if entry is None or any(t.find(value) for value in (*args, *kwargs.values())):
        return NotImplemented

    def transform(image: Tensor) -> Any:
        return function(image, *args, **kwargs)

    return t.derive(transform, entry, tangent=transform)


def _shift(
    t: Tracker,
    function: Callable[[Any, Any], Any],
    input: Any,
    other: Any,
    alpha: float,
    sign_of_other: float,
) -> Any:
    if alpha != 1:
        return NotImplemented
    entry, term = _one_tracked(t, input, other)
    if not t.from_batch(input, other):
        return t.affine(function, input, other)
    if entry is None or not _rows_of(term, entry):
        return NotImplemented
    sign = sign_of_other if term is input else 1.0
    output = function(t.value(input), t.value(other))
    return t.tap(output, Broadcast(entry.value.shape, sign), (entry,), term)


def _one_tracked(t: Tracker, input: Any, other: Any) -> tuple[Tracked | None, Any]:
    """Return the tracked operand, if there is exactly one, and the other one."""
    left, right = t.find(input), t.find(other)
    if left is not None and right is not None:
        return None, None
    return (right, input) if left is None else (left, other)


def _rows_of(operand: Any, entry: Tracked) -> bool:
    """Return whether the leading dimension of the result is that of this other operand."""
    if not isinstance(operand, Tensor) or operand.dim() == 0:
        return False
    shape = entry.value.shape
    if operand.dim() != len(shape):
        return operand.dim() > len(shape)
    return shape[0] in (1, len(operand))
