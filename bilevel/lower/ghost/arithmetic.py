"""Rules for arithmetic with parameters, concatenation, and views of them. See ``operations``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.lower.ghost.context import Tracked
from bilevel.lower.ghost.elementwise_uses import Broadcast, Concatenated
from bilevel.lower.ghost.tracker import Tracker


def multiply(t: Tracker, input: Any, other: Any) -> Any:
    """Apply ``input · other``, one of which is the parameter."""
    entry, factor, _ = _one_tracked(t, input, other)
    if entry is None:
        return NotImplemented
    if _is_number(factor):
        return t.derive(entry, lambda parameter: parameter * factor)
    if not _rows_of(factor, entry):
        return NotImplemented
    output = torch.mul(t.value(input), t.value(other))
    return t.tap(output, Broadcast(entry.value.shape), (entry,), (factor,))


def divide(t: Tracker, input: Any, other: Any) -> Any:
    """Apply ``input / other``, the parameter over a number."""
    entry = t.find(input)
    if entry is None or not _is_number(other):
        return NotImplemented
    return t.derive(entry, lambda parameter: parameter / other)


def add(t: Tracker, input: Any, other: Any, *, alpha: float = 1) -> Any:
    """Apply ``input + other``, one of which is the parameter."""
    return _shift(t, torch.add, input, other, alpha, sign_of_other=1.0)


def subtract(t: Tracker, input: Any, other: Any, *, alpha: float = 1) -> Any:
    """Apply ``input − other``, one of which is the parameter."""
    return _shift(t, torch.sub, input, other, alpha, sign_of_other=-1.0)


def subtract_reversed(t: Tracker, input: Any, other: Any) -> Any:
    """Apply ``other − input``, for Python's reflected operator."""
    return subtract(t, other, input)


def concatenate(t: Tracker, tensors: Sequence[Tensor], dim: int = 0, **named: Any) -> Any:
    """Apply ``cat`` to the parameter and the examples along a dimension other than the rows."""
    dim = named.get("axis", dim)
    dim = dim % tensors[0].dim()
    if dim == 0 or all(t.find(tensor) for tensor in tensors):
        return NotImplemented
    output = torch.cat([t.value(tensor) for tensor in tensors], dim)
    start = 0
    for tensor in tensors:
        entry = t.find(tensor)
        if entry is not None:
            output = t.tap(output, Concatenated(dim, start, tensor.shape), (entry,))
        start += tensor.shape[dim]
    return output


def view(t: Tracker, input: Any, *args: Any, function: Callable[..., Any], **kwargs: Any) -> Any:
    """Apply a view, cast or other linear map of the parameter alone."""
    entry = t.find(input)
    if entry is None or any(t.find(value) for value in (*args, *kwargs.values())):
        return NotImplemented
    return t.derive(entry, lambda parameter: function(parameter, *args, **kwargs))


def _shift(
    t: Tracker,
    function: Callable[..., Any],
    input: Any,
    other: Any,
    alpha: float,
    sign_of_other: float,
) -> Any:
    entry, term, is_other = _one_tracked(t, input, other)
    sign = sign_of_other if is_other else 1.0
    if entry is None or alpha != 1:
        return NotImplemented
    if _is_number(term):

        def shifted(parameter: Tensor) -> Any:
            if is_other:  # A number plus or minus the parameter.
                return parameter + term if sign > 0 else torch.rsub(parameter, term)
            return function(parameter, term)

        return t.derive(entry, shifted, lambda direction: sign * direction)
    if not _rows_of(term, entry):
        return NotImplemented
    output = function(t.value(input), t.value(other))
    return t.tap(output, Broadcast(entry.value.shape, sign), (entry,))


def _one_tracked(t: Tracker, input: Any, other: Any) -> tuple[Tracked | None, Any, bool]:
    """Return the tracked operand, the other one, and whether ``other`` is the tracked one."""
    left, right = t.find(input), t.find(other)
    if left is not None and right is not None:
        return None, None, False
    return (right, input, True) if left is None else (left, other, False)


def _rows_of(operand: Any, entry: Tracked) -> bool:
    """Return whether the leading dimension of the result is that of this other operand."""
    if not isinstance(operand, Tensor) or operand.dim() == 0:
        return False
    shape = entry.value.shape
    if operand.dim() != len(shape):
        return operand.dim() > len(shape)
    return shape[0] in (1, len(operand))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
