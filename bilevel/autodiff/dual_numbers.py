"""Explicit dual numbers, for operations whose forward-mode derivative in torch is slow.

A dual number is a value with a tangent, which ``torch.func.jvp`` passes to the function that it
differentiates. ``torch.autograd.forward_ad`` unpacks and makes dual numbers at the innermost level
of nested derivatives, so formulas in terms of them compose with all other derivatives.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad


class Dual(NamedTuple):
    """A value and its tangent, which is None for a constant."""

    value: Any
    tangent: Tensor | None


def parts(*values: Any) -> tuple[Dual, ...] | None:
    """Return values and tangents; None if no value has a tangent, or under ``torch.vmap``.

    Numbers are constants. Under ``torch.vmap`` torch cannot unpack dual numbers, and its own
    derivatives are used.
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
    """Return the dual number of a value and its tangent, of the same shape and precision."""
    dual: Tensor = forward_ad.make_dual(value, tangent)
    return dual
