"""Finds out when a backward pass recomputes a part of the model with other parameters.

Activation checkpointing runs a part of the model again during the backward pass. If the loss calls
a module by ``torch.func.functional_call``, that call has ended by then and the module holds its own
parameters again, so the gradient would silently be that of another function. Nothing in autograd
notices, because the shapes are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError

from bilevel.autodiff.torch_private import run_backward


class RecomputationError(CheckpointError):
    """A backward pass recomputed a part of the model with other parameters than the loss had."""


def watched_backward(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
    accumulate: bool = False,
) -> Sequence[Tensor | None]:
    """Return the gradients; refuse those of a pass that used other parameters than the forward one.

    A recomputation that uses the same parameters, frozen ones included, passes. The arguments are
    those of ``torch_private.run_backward``.

    Cost: a look at the arguments of the torch functions that Python code calls in the backward
    pass. Only if a ``Parameter`` that requires grad is among them, the graph is searched for it.

    Raises:
        RecomputationError: A part was recomputed with other parameters.
        RuntimeError: torch's own; with a note where the graph of the outputs was used up before.
    """
    try:
        with _Watch() as watch:
            gradients = run_backward(
                outputs,
                inputs,
                cotangents,
                create_graph=create_graph,
                accumulate=accumulate,
            )
    except CheckpointError as error:
        found = f"other tensors than in the forward pass ({str(error).splitlines()[0]})"
        raise RecomputationError(_REFUSAL.format(found)) from error
    except RuntimeError as error:
        if "backward through the graph a second time" in str(error):
            error.add_note(_USED_UP)
        raise
    if watch.parameters:
        used = _leaves(outputs)
        foreign = [leaf for key, leaf in watch.parameters.items() if key not in used]
        if foreign:
            found = f"the module's own parameters (the first of shape {tuple(foreign[0].shape)})"
            raise RecomputationError(_REFUSAL.format(found))
    return gradients


_REFUSAL = (
    "the backward pass recomputed a part of the model (activation checkpointing) with {}: where "
    "functional_call gives the parameters, it has put the module's own back by then; call the "
    "module by f = bilevel.functional(module), f(params, ...), whose calls can be recomputed, or "
    "switch checkpointing off"
)

_USED_UP = (
    "The loss was differentiated before it was returned: leave .backward() to the solver, and take "
    "gradients within a loss by torch.autograd.grad(..., create_graph=True)."
)


class _Watch(TorchFunctionMode):
    """Collects the parameters, by identity, that torch functions are given with autograd on."""

    def __init__(self) -> None:
        super().__init__()
        self.parameters: dict[int, Tensor] = {}

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        used = True  # The last operation of a recomputation is left by an exception.
        try:
            result = func(*args, **kwargs)
            used = _requires_grad(result)
        finally:
            if used and torch.is_grad_enabled():
                for value in (*args, *kwargs.values()):
                    self._collect(value)
                    if type(value) in (list, tuple):
                        for item in value:
                            self._collect(item)
        return result

    def _collect(self, value: Any) -> None:
        if isinstance(value, nn.Parameter) and value.requires_grad:
            self.parameters[id(value)] = value


def _requires_grad(result: Any) -> bool:
    """Return whether the result of a torch function has a graph: asking for a shape has none."""
    if isinstance(result, Tensor):
        return result.requires_grad
    if type(result) in (tuple, list):
        return any(isinstance(item, Tensor) and item.requires_grad for item in result)
    return False


def _leaves(outputs: Sequence[Tensor]) -> set[int]:
    """Return the identities of the leaves of a graph, which stays after a backward pass."""
    pending = [output.grad_fn for output in outputs]
    seen: set[Any] = set()
    leaves: set[int] = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves.add(id(variable))
        pending.extend(following for following, _ in node.next_functions)
    return leaves
