"""What torch needs to be told before it differentiates a model twice, or in forward mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

# Scores of one block of attention: 2 MB in float32, which stay in a core's cache. On other devices
# every block costs launches, and the limit is there for memory alone.
_CPU_SCORES, _SCORES, _LEAST_ROWS = 1 << 19, 1 << 24, 64

# What torch's messages about missing derivatives have in common.
UNSUPPORTED = ("forward AD", "forward-mode", "functorch", "jvp", "double backward")


@contextmanager
def differentiable_kernels() -> Iterator[None]:
    """Run with operations that have forward-mode and second derivatives, right ones.

    Attention takes its only kernel that has them, MATH, for a block of queries at a time;
    `masked_scatter` its equal: see `_Equals`.

    Raises:
        RuntimeError: Some other operation lacks them, with torch's message and what to do.
    """
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH), _Equals():
            # torch itself compiles some of its forward-mode formulas with its deprecated compiler.
            warnings.filterwarnings("ignore", message=r".*torch\.jit", category=DeprecationWarning)
            yield
    except (NotImplementedError, RuntimeError) as error:
        text = str(error)
        if not any(part in text for part in UNSUPPORTED):
            raise
        if "captured Tensor" in text:
            raise RuntimeError(
                f"the loss writes into a tensor that is not its argument: {text}. If it is a "
                "module's buffer (batch normalisation in training mode), pass a copy: "
                "functional_call(module, {**params, **{k: b.clone() for k, b in "
                "module.named_buffers()}}, ...)"
            ) from error
        raise RuntimeError(
            f"a torch operation lacks the derivative that this route needs: {text}. Use "
            "attn_implementation='eager' (or torch's MATH attention kernel) and plain torch "
            "operations, or choose the route Ghost(), PerExample() or CentralDifference()"
        ) from error


class _Equals(TorchFunctionMode):
    """Puts other operations with the same values in the place of some.

    `masked_scatter`, with which multimodal models of transformers put image features among the
    text's: in forward over reverse torch (seen in 2.13) gives the gradient of the scattered values
    the tangent of the whole tensor, which raises for its size or, where that fits, is wrong.

    `scaled_dot_product_attention`: its MATH kernel holds the scores of all queries with all keys
    at once, and its causal form computes those it masks. The derivative of 1,024 tokens took 7
    forward passes, and takes 4 in blocks.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.masked_scatter, Tensor.masked_scatter):
            return _masked_scatter(*args, **kwargs)
        if func is Tensor.masked_scatter_:
            return args[0].copy_(_masked_scatter(*args, **kwargs))
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _masked_scatter(input: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """The k-th true entry of the mask, in memory order, gets the k-th entry of `source`."""
    input, mask = torch.broadcast_tensors(input, mask)
    if not source.numel():
        return input.clone()
    place = (mask.reshape(-1).cumsum(0) - 1).clamp(0, source.numel() - 1)
    return torch.where(mask, source.reshape(-1)[place].view(mask.shape), input)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """Attention for a block of queries at a time; of the keys, only those up to a causal block.

    Dropout draws its numbers for all queries at once, so then all are one block.
    """
    rows, keys = query.shape[-2], key.shape[-2]
    scores = _CPU_SCORES if query.is_cpu else _SCORES
    size = max(_LEAST_ROWS, scores // max(query.shape[:-2].numel() * keys, 1))
    whole: Any = partial(functional.scaled_dot_product_attention, **options)
    if size >= rows or dropout_p or query.is_nested or (is_causal and attn_mask is not None):
        return whole(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal
        )
    blocks = []
    for start in range(0, rows, size):
        end = min(start + size, rows)
        seen, mask = keys, attn_mask
        if is_causal:
            seen = min(end, keys)
            mask = torch.ones(end - start, seen, dtype=torch.bool, device=query.device).tril(start)
        elif mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
            mask = mask[..., start:end, :]
        block = query[..., start:end, :]
        blocks.append(whole(block, key[..., :seen, :], value[..., :seen, :], attn_mask=mask))
    return torch.cat(blocks, dim=-2)
