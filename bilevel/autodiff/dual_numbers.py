"""Dual numbers by hand, where torch's own forward-mode derivative takes many passes over memory.

A dual number is a value with a tangent, what ``torch.func.jvp`` gives to the function that it
differentiates. ``torch.autograd.forward_ad`` takes it apart and puts it together, at the innermost
level of nested derivatives, so the formulas made with it compose with all others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad


class Dual(NamedTuple):
    """A value and its tangent; None: it does not move."""

    value: Any
    tangent: Tensor | None


def parts(*values: Any) -> tuple[Dual, ...] | None:
    """Take tensors apart; numbers do not move. None if nothing does, and under ``torch.vmap``.

    There torch cannot take dual numbers apart, and its own derivatives have to do.
    """
    try:
        duals = tuple(
            Dual(*forward_ad.unpack_dual(value)) if isinstance(value, Tensor) else Dual(value, None)
            for value in values
        )
    except RuntimeError as error:
        if "Batching rule not implemented" not in str(error):
            raise
        return None
    return None if all(dual.tangent is None for dual in duals) else duals


def joined(
    value: Float[Tensor, "*shape"], tangent: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Put a value and its tangent, of the same shape and precision, together."""
    dual: Tensor = forward_ad.make_dual(value, tangent)
    return dual
