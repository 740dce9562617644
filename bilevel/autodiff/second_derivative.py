"""Whether the gradient of a loss may be computed with a graph, for derivatives of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

# Nodes of autograd whose second derivative is missing or wrong (``kernels`` replaces their
# operations), or whose first one is computed in another way, with other last bits, if it gets a
# graph (group normalisation). A test runs all of torch.nn.functional against this list.
_UNSUITABLE = (
    "MaskedScatterBackward",
    "NativeGroupNormBackward",
    "ScaledDotProduct",
    "WeightNormInterfaceBackward",
)


def has_second_derivative(loss: Tensor) -> bool:
    """Return whether the gradient of a loss has the same bits with a graph, which is right.

    Custom functions may cut the graph of their gradient (``once_differentiable``), so with one in
    the loss the answer is no.

    Args:
        loss: A tensor with its graph, which is looked at, node by node.
    """
    pending = [loss.grad_fn]
    seen: set[Any] = {None}
    while pending:
        node: Any = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        name = type(node).__name__
        if name.startswith(_UNSUITABLE) or isinstance(node, BackwardCFunction):
            return False
        if name.startswith("EmbeddingBackward") and node._saved_scale_grad_by_freq:
            return False
        pending.extend([following for following, _ in node.next_functions])
    return True
