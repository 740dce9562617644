"""Attention with forward-mode and second derivatives, computed in blocks of queries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from bilevel import tree
from bilevel.autodiff import dual_numbers
from bilevel.autodiff.dual_numbers import Dual
from bilevel.autodiff.torch_private import softmax_tangent

# The number of scores of one block of attention. On a CPU it is 2 MB in float32, which stays in a
# core's cache. On other devices every block costs kernel launches, and the limit serves
# memory alone.
_CPU_SCORES, _SCORES, _LEAST_ROWS = 1 << 19, 1 << 24, 64


def attention(
    query: Float[Tensor, "*batch queries size"],
    key: Float[Tensor, "... keys size"],
    value: Float[Tensor, "... keys width"],
    attn_mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "*batch queries width"]:
    """Compute ``torch.nn.functional.scaled_dot_product_attention`` in blocks of queries.

    torch's MATH kernel, the only one with these derivatives, holds the scores of all queries. A
    block with a causal mask omits the keys that the mask hides. Dropout draws its random numbers
    for all queries at once, so with dropout there is one block.
    """
    whole: Callable[..., Tensor] = partial(
        functional.scaled_dot_product_attention, scale=scale, enable_gqa=enable_gqa
    )
    if dropout_p or query.is_nested or (is_causal and attn_mask is not None):
        return whole(query, key, value, attn_mask, dropout_p, is_causal)
    blocks = _blocks(query, key, attn_mask, is_causal)
    duals = dual_numbers.parts(query, key, value)
    still = attn_mask is None or dual_numbers.parts(attn_mask) is None
    if duals is not None and still and not torch.is_autocast_enabled(query.device.type):
        return _dual_attention(duals, blocks, scale, enable_gqa)
    outputs = [
        whole(query[..., rows, :], key[..., :seen, :], value[..., :seen, :], attn_mask=mask)
        for rows, seen, mask, _ in blocks
    ]
    return torch.cat(outputs, dim=-2)


class _Block(NamedTuple):
    """A block of queries, the number of keys that they attend to, and their mask.

    A causal mask hides no key before column ``hiding``; other masks may hide any key.
    """

    rows: slice
    seen: int
    mask: Tensor | None
    hiding: int | None = None


def _blocks(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> Iterator[_Block]:
    rows, keys = query.shape[-2], key.shape[-2]
    scores = _CPU_SCORES if query.is_cpu else _SCORES
    size = max(_LEAST_ROWS, scores // max(query.shape[:-2].numel() * keys, 1))
    for start in range(0, max(rows, 1), size):
        end = min(start + size, rows)
        if is_causal:
            seen = min(end, keys)
            causal = torch.ones(end - start, seen, dtype=torch.bool, device=query.device)
            yield _Block(slice(start, end), seen, causal.tril(start), min(start, seen))
        elif mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
            yield _Block(slice(start, end), keys, mask[..., start:end, :])
        else:
            yield _Block(slice(start, end), keys, mask)


def _dual_attention(
    duals: Sequence[Dual], blocks: Iterable[_Block], scale: float | None, grouped: bool
) -> Tensor:
    """Return O = P V with its tangent O' = P' V + P V', where P = softmax(S), S = scale Q Kᵀ.

    S' = scale (Q' Kᵀ + Q K'ᵀ) is one product of twice the inner dimension, and
    P' = P (S' − Σ P S') is one kernel (``softmax_tangent``). torch's derivative of the MATH kernel
    takes about ten passes over the scores for the softmax.
    """
    (q, q_moved), (k, k_moved), (v, v_moved) = (_wide(one) for one in duals)
    if grouped:
        k, k_moved, v, v_moved = (
            one.repeat_interleave(q.shape[-3] // one.shape[-3], -3)
            for one in (k, k_moved, v, v_moved)
        )
    size = q.shape[-1]
    both_queries = torch.cat([q_moved, q], -1).mul_(size**-0.5 if scale is None else scale)
    both_keys, both_values = torch.cat([k, k_moved], -1), torch.cat([v, v_moved], -1)
    q, k, v = both_queries[..., size:], both_keys[..., :size], both_values[..., : v.shape[-1]]
    values, tangents = [], []
    for rows, seen, mask, hiding in blocks:
        scores = q[..., rows, :] @ k[..., :seen, :].mT
        moved = both_queries[..., rows, :] @ both_keys[..., :seen, :].mT
        sees_nothing = None
        if mask is not None and hiding is not None:
            scores[..., hiding:].masked_fill_(mask[:, hiding:].logical_not(), -torch.inf)
        elif mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(mask.logical_not(), -torch.inf)
            sees_nothing = mask.any(-1, keepdim=True).logical_not()
        elif mask is not None:
            scores = scores + mask
            sees_nothing = mask.isneginf().all(-1, keepdim=True)
        p = torch.softmax(scores, -1)
        p_moved = softmax_tangent(p, moved)
        out, out_moved = (p @ both_values[..., :seen, :]).chunk(2, -1)
        out_moved = out_moved + p_moved @ v[..., :seen, :]
        if sees_nothing is not None:  # As in the MATH kernel, a query without keys gets zeros.
            out, out_moved = (one.masked_fill(sees_nothing, 0.0) for one in (out, out_moved))
        values.append(out)
        tangents.append(out_moved)
    dtype = duals[0].value.dtype
    return dual_numbers.joined(torch.cat(values, -2).to(dtype), torch.cat(tangents, -2).to(dtype))


def _wide(one: Dual) -> tuple[Tensor, Tensor]:
    """Return value and tangent in at least float32, the precision of the MATH kernel."""
    tangent = torch.zeros_like(one.value) if one.tangent is None else one.tangent
    dtype = tree.wide_dtype(one.value.dtype)
    return one.value.to(dtype), tangent.to(dtype)
