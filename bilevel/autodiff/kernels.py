"""Replacements of operations so that torch can differentiate a model twice or in forward mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from bilevel.autodiff import equivalents
from bilevel.autodiff.attention import attention
from bilevel.autodiff.stop_gradients import call_without_tangents
from bilevel.autodiff.torch_private import WEIGHT_NORM

# Parts of torch's error messages about missing derivatives.
UNSUPPORTED = (
    "forward AD",
    "forward-mode",
    "functorch",
    "torch.func",
    "jvp",
    "ZeroTensors",
    "data pointer of Tensor",
    "storage of Tensor",
    "double backward",
    "derivative for",
)


@contextmanager
def differentiable_kernels() -> Iterator[None]:
    """Run the body, a loss and double backward, with operations that have those derivatives.

    Attention uses the MATH kernel, the only one that has them, in blocks of queries. ``_Equals``
    replaces some other operations by equivalent ones.

    Raises:
        RuntimeError: Another operation lacks them. The message holds torch's own and a remedy.
    """
    with _advice("CentralDifference()"), _kernels(), _Equals():
        yield


@contextmanager
def forward_mode_loss() -> Iterator[None]:
    """Run the body, a loss within transforms, as ``differentiable_kernels`` would run it.

    Grad mode is on, and what the loss computes after switching it off is a constant for the
    transforms, too: see ``bilevel.autodiff.stop_gradients``. It belongs into the function that is
    transformed, and the transforms into ``kernels_for_transforms``.
    """
    with torch.enable_grad(), _ForwardEquals():
        yield


@contextmanager
def kernels_for_transforms() -> Iterator[None]:
    """Run the body, transforms of ``torch.func``, with kernels that have all derivatives.

    Raises:
        RuntimeError: As ``differentiable_kernels``.
    """
    with _advice("Reverse() or CentralDifference()"), _kernels():
        yield


@contextmanager
def _kernels() -> Iterator[None]:
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        # torch itself compiles some of its forward-mode formulas with its deprecated compiler.
        warnings.filterwarnings("ignore", message=r".*torch\.jit", category=DeprecationWarning)
        yield


@contextmanager
def _advice(routes: str) -> Iterator[None]:
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        text = str(error)
        if not any(part in text for part in UNSUPPORTED):
            raise
        if "captured Tensor" in text:
            raise RuntimeError(
                f"the loss writes into a tensor that is not its argument: {text}. If it is a "
                "module's buffer (batch normalisation in training mode), call the module by "
                "f = bilevel.functional(module), f(params, ...), which clones buffers for each call"
            ) from error
        raise RuntimeError(
            f"a torch operation lacks the derivative that this route needs: {text}. Use "
            "attn_implementation='eager' (or torch's MATH attention kernel) and plain torch "
            f"operations, or choose the route {routes}"
        ) from error


class _Equals(TorchFunctionMode):
    """Replaces some operations by others with the same values.

    The MATH kernel of ``scaled_dot_product_attention`` holds the scores of all queries with all
    keys at once, and with a causal mask computes the masked ones, too. For 1,024 tokens the
    derivative cost as much as 7 forward passes, in blocks 4, and with explicit dual numbers it
    costs 3.1 (``bilevel.autodiff.attention``).
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        equal = _equivalent(func, kwargs)
        return self._call(func, args, kwargs) if equal is None else equal(*args, **kwargs)

    def _call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        return func(*args, **kwargs)


_EQUIVALENTS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    torch.masked_scatter: equivalents.masked_scatter,
    Tensor.masked_scatter: equivalents.masked_scatter,
    Tensor.masked_scatter_: lambda input, *rest, **named: input.copy_(
        equivalents.masked_scatter(input, *rest, **named)
    ),
    functional.scaled_dot_product_attention: attention,
    WEIGHT_NORM: equivalents.weight_norm,
}


def _equivalent(
    func: Callable[..., Any], kwargs: Mapping[str, Any]
) -> Callable[..., Tensor] | None:
    """Return what stands for an operation whose second derivative is wrong or missing."""
    if func is functional.embedding and kwargs.get("scale_grad_by_freq"):
        return equivalents.embedding
    return _EQUIVALENTS.get(func)


_IN_FORWARD_MODE: dict[Callable[..., Any], Callable[..., Tensor]] = {
    functional.mse_loss: equivalents.mse_loss,
    functional.huber_loss: equivalents.huber_loss,
    functional.soft_margin_loss: equivalents.soft_margin_loss,
    functional.dropout: equivalents.dropout,
    torch.dropout: equivalents.dropout,
    functional.alpha_dropout: equivalents.alpha_dropout,
    torch.alpha_dropout: equivalents.alpha_dropout,
    functional.embedding: equivalents.embedding,
}


class _ForwardEquals(_Equals):
    """The same, with the constants that autograd sees, and what forward mode has wrong."""

    def _call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        return call_without_tangents(_IN_FORWARD_MODE.get(func, func), args, kwargs)
