"""Activation checkpointing: a layer stores only its inputs and is recomputed in the backward pass.

transformers offers this (``gradient_checkpointing_enable``) for modules that own their parameters.
Here parameters are passed to the model by ``functional_call``, and that call has ended when the
backward pass recomputes a layer, so transformers' recomputation would silently use the module's own
values. This module recomputes a layer with the parameters of its first pass, and under the torch
function modes of its first pass, such as the taps of ``bilevel.lower.ghost``.

It is switched on by ``PRM.activation_checkpointing``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from prm.models.torch_internals import function_modes, inside_transform


def in_vision(model: Any, names: Iterable[str]) -> list[str]:
    """Return those of some names that stand in front of the language model.

    Args:
        model: A transformers model.
        names: Dotted names in ``model``, from ``named_modules`` or ``named_parameters``.
    """
    behind = (model.get_decoder(), model.get_output_embeddings())
    paths = [path for path, module in model.named_modules() if any(module is m for m in behind)]
    if "" in paths:
        return []
    return [name for name in names if not any(f"{name}.".startswith(f"{p}.") for p in paths)]


@contextmanager
def checkpointed(model: nn.Module, *, vision_only: bool = False) -> Iterator[None]:
    """Within this context, the layers of a transformers model store only their inputs.

    Cost: one more forward pass of the layers in every backward pass. Memory: the inputs of all
    layers and the activations of one. Passes without a backward pass are not affected, nor are
    passes inside a transform of ``torch.func``, whose forward mode stores no activations.

    Args:
        model: The model. Its layers are the modules that transformers would checkpoint.
        vision_only: Whether only layers in front of the language model do.

    Raises:
        ValueError: The model has no such layers.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    named = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer)
    }
    layers = [named[name] for name in (in_vision(model, named) if vision_only else named)]
    if not layers:
        where = " in front of its language model" if vision_only else ""
        raise ValueError(
            f"{type(model).__name__} does not say which of its modules{where} are layers "
            "(GradientCheckpointingLayer): switch activation checkpointing off"
        )
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(_restore_forward, layer, layer.__dict__.get("forward"))
            layer.forward = partial(_keeping_inputs, layer, layer.forward)
        yield


def _restore_forward(layer: nn.Module, forward: Callable[..., Any] | None) -> None:
    del layer.forward
    if forward is not None:
        layer.forward = forward


def _keeping_inputs(
    layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    # Saved-tensor hooks, which checkpoint uses, do not work inside torch.func's transforms.
    if inside_transform() or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    params = {f"layer.{name}": value for name, value in layer.named_parameters()}
    run = partial(_run, _Layer(layer, forward), params, function_modes())
    return checkpoint(run, *args, use_reentrant=False, **kwargs)


def _run(
    layer: _Layer,
    params: dict[str, Any],
    modes: Sequence[TorchFunctionMode],
    *args: Any,
    **kwargs: Any,
) -> Any:
    present = function_modes()
    with ExitStack() as stack:
        for mode in modes:
            if not any(mode is one for one in present):
                stack.enter_context(mode)
        return functional_call(layer, params, args, kwargs)


class _Layer(nn.Module):
    """A layer that runs the forward pass of its class while the instance's own is replaced."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.layer = layer
        self.run = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)
