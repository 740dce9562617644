"""Whether the gradient of a loss may be computed with a graph, for derivatives of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction, Function, FunctionMeta
from torch.overrides import TorchFunctionMode

# Nodes of autograd whose second derivative is missing or wrong (``kernels`` replaces their
# operations), or whose first one is computed in another way, with other last bits, if it gets a
# graph (group normalisation, SiLU, Mish, LSTMs in float32). A test runs all of torch.nn.functional
# against this list.
_UNSUITABLE = (
    "MaskedScatterBackward",
    "MishBackward",
    "MkldnnRnnLayerBackward",
    "NativeGroupNormBackward",
    "ScaledDotProduct",
    "SiluBackward",
    "WeightNormInterfaceBackward",
)


def has_second_derivative(loss: Tensor, inputs: Iterable[Tensor]) -> bool:
    """Return whether the gradient of a loss has the same bits with a graph, which is right.

    A custom function whose backward pass is decorated may cut the graph of its gradient, as
    ``once_differentiable`` does, so with one in the loss the answer is no.

    Args:
        loss: A tensor with its graph, which is looked at node by node.
        inputs: Where to stop.
    """
    pending = [] if loss.grad_fn is None else [loss.grad_fn]
    seen: set[Any] = {None, loss.grad_fn, *[tensor.grad_fn for tensor in inputs]}
    while pending:
        node: Any = pending.pop()
        if not _is_suitable(node):
            return False
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                pending.append(following)
    return True


def _is_suitable(node: Any) -> bool:
    if isinstance(node, BackwardCFunction):
        return not hasattr(_backward_of(node), "__wrapped__")
    embeds, suitable = _of_name(type(node).__name__)
    return suitable and not (embeds and node._saved_scale_grad_by_freq)


@cache
def _of_name(name: str) -> tuple[bool, bool]:
    """Return of a name of one of torch's own nodes: whether it is an embedding, and suits."""
    return name.startswith("EmbeddingBackward"), not name.startswith(_UNSUITABLE)


class RefuseOnceDifferentiable(TorchFunctionMode):
    """Refuses custom functions whose backward pass has no derivative, in a loss under transforms.

    Forward mode takes what such a backward pass computes for a constant, without a word.

    Raises:
        RuntimeError: There is one.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # What ``torch.func`` calls for ``Function.apply``, the function being its first argument.
        if getattr(func, "__name__", None) == "custom_function_call" and args:
            backward = _backward(args[0]) if isinstance(args[0], FunctionMeta) else None
            if hasattr(backward, "__wrapped__"):
                raise RuntimeError(ONCE_DIFFERENTIABLE)
        return func(*args, **(kwargs or {}))


ONCE_DIFFERENTIABLE = (
    "the backward of a custom autograd.Function is marked once_differentiable, so the gradient of "
    "the lower loss has no derivative: choose CentralDifference()"
)


def _backward_of(node: Any) -> Any:
    """Return the backward pass of a custom function, from its node."""
    return _backward(type(node)._forward_cls)


def _backward(function: Any) -> Any:
    return function.vjp if function.vjp is not Function.vjp else function.backward
