"""Gradients of a parameter row by row: their weighted sum and their products with a direction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import tree

# Σ_r weight_r · gradient_r, shaped like the parameter, and ⟨direction, gradient_r⟩ [rows]. Each is
# None if it was not requested.
Sums: TypeAlias = tuple[Tensor | None, Tensor | None]

# The number of entries of gradients that are formed at a time. They fit in a cache and in memory
# that the allocator already holds. On a CPU, 2^18 to 2^22 were measured to be equally fast. On a
# device each chunk is four launches; these are 256 MB in float32.
CHUNK_ENTRIES = 1 << 20
OFF_CPU_CHUNK_ENTRIES = 1 << 26


@dataclass(frozen=True, eq=False)
class RowGradients:
    """Gradients of one parameter, one per row of the leading dimension, formed or not.

    Attributes:
        sums: The function from row weights [rows] and a direction shaped like the parameter, either
            of which may be None, to ``Sums``.
        flat: The gradients, [rows, entries], if they are formed.
    """

    sums: Callable[[Tensor | None, Tensor | None], Sums]
    flat: Float[Tensor, "rows entries"] | None = None


def formed(gradients: Float[Tensor, "rows ..."], shape: torch.Size | None = None) -> RowGradients:
    """Return gradients from a tensor [rows, ...]; ``shape`` is the parameter's if it differs."""
    flat = gradients.flatten(1) if gradients.dim() > 1 else gradients[:, None]
    shape = gradients.shape[1:] if shape is None else shape

    def sums(weights: Tensor | None, direction: Tensor | None) -> Sums:
        weighted = None if weights is None else weights.matmul(flat).reshape(shape)
        return weighted, None if direction is None else flat.mv(vector(direction, flat))

    return RowGradients(sums, flat)


def products(
    left: Float[Tensor, "rows tokens m"], right: Float[Tensor, "rows tokens n"]
) -> RowGradients:
    """Return gradients Σ_tokens left ⊗ right, [rows, m, n], formed for a few rows at a time."""
    shape = torch.Size([left.shape[2], right.shape[2]])
    step = max(1, _most_entries(left) // shape.numel())

    def sums(weights: Tensor | None, direction: Tensor | None) -> Sums:
        weighted, dots = None, []
        along = None if direction is None else vector(direction, left)
        for start in range(0, len(left), step):
            chunk = slice(start, start + step)
            flat = torch.bmm(left[chunk].transpose(1, 2), right[chunk]).flatten(1)
            if weights is not None:
                term = weights[chunk].matmul(flat)
                weighted = term if weighted is None else weighted.add_(term)
            if along is not None:
                dots.append(flat.mv(along))
        weighted = None if weighted is None else weighted.reshape(shape)
        return weighted, (torch.cat(dots) if len(dots) > 1 else dots[0]) if dots else None

    return RowGradients(sums)


def contracted(
    weighted: Callable[[Tensor], Tensor], dots: Callable[[Tensor], Tensor]
) -> RowGradients:
    """Return gradients that are never formed.

    Args:
        weighted: The function from row weights to the weighted sum.
        dots: The function from a direction to the products with it.
    """

    def sums(weights: Tensor | None, direction: Tensor | None) -> Sums:
        return (
            None if weights is None else weighted(weights),
            None if direction is None else dots(direction),
        )

    return RowGradients(sums)


def row_dots(
    b: Float[Tensor, " rows *inner"], along: Float[Tensor, " rows *inner"]
) -> Float[Tensor, " rows"]:
    """Return Σ b · along over all dimensions but the rows, [rows], in at least float32."""
    wide = tree.wide_dtype(b.dtype)
    return (b * along)[..., None].flatten(1).sum(1, dtype=wide)  # rows of numbers, too


def scale_rows(
    b: Float[Tensor, " rows *inner"], weights: Float[Tensor, " rows"]
) -> Float[Tensor, " rows *inner"]:
    """Return b with row r times weight r."""
    return b * weights.reshape(-1, *[1] * (b.dim() - 1))


def sum_tokens(rows: Float[Tensor, "rows ..."], inner: torch.Size) -> Float[Tensor, "rows ..."]:
    """Sum [rows, ..., *inner] over the dimensions that broadcast ``inner``, except the rows."""
    kept = rows.sum_to_size(len(rows), *[1] * (rows.dim() - 1 - len(inner)), *inner)
    return kept.reshape(len(rows), *inner)


def _most_entries(like: Tensor) -> int:
    return CHUNK_ENTRIES if like.is_cpu else OFF_CPU_CHUNK_ENTRIES


def vector(direction: Tensor, like: Tensor) -> Float[Tensor, " entries"]:
    """Return a direction as one vector, in the precision of gradients."""
    return direction.to(like.dtype).reshape(-1)
