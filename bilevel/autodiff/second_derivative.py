"""Whether the gradient of a loss may be computed with a graph, for derivatives of it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction, Function

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
    pending = [loss.grad_fn]
    seen: set[Any] = {None, loss.grad_fn, *[tensor.grad_fn for tensor in inputs]}
    while pending:
        node: Any = pending.pop()
        if node is None or not _is_suitable(node):
            return node is None
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


def _backward_of(node: Any) -> Any:
    """Return the backward pass of a custom function, from its node."""
    function = type(node)._forward_cls
    return function.vjp if function.vjp is not Function.vjp else function.backward
