"""The boundary of what is trained: what a forward pass computes before any trained parameter.

With the parameters split into frozen ones and trained ones θ, a forward pass is

    f(x; θ) = g(h(x); θ)

where h is everything before the first use of a trained parameter. h(x) is the same in every step,
so it can be kept (``prm.activations``). ``find_boundary`` finds where h ends, ``frozen_states``
computes h, and ``going_on`` has the passes of a model compute g alone.

h ends in one of three places: behind some first layers of the language model; behind the image
features (vision tower and projector), if a trained parameter comes before the first layer; or
behind the vision tower alone, if the projector is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from prm.models.activation_checkpointing import in_vision

FROZEN_STATES = "frozen_states"
"""The entry of a batch that holds h(x) of all its rows."""


@dataclass(frozen=True)
class Boundary:
    """Where the frozen front of a model ends.

    Attributes:
        place: "layers": behind the first layers of the language model. "image features": behind
            what turns pictures into tokens. "vision tower": behind the tower, before a projector.
        layers: The number of those layers; 0 at another place.
        tensors: The parameters and buffers in front of it, by their names in ``state_dict``.
    """

    place: Literal["layers", "image features", "vision tower"]
    layers: int
    tensors: tuple[str, ...]

    def __str__(self) -> str:
        return f"the first {self.layers} layers" if self.layers else f"the {self.place}"


def find_boundary(model: Any, trained: Mapping[str, Tensor]) -> Boundary | None:
    """Return where the frozen front of a model ends, or None if a trained parameter comes first.

    Autograd itself says how far no layer of the language model depends on a trained parameter, in
    one pass over two tokens.

    Args:
        model: A transformers model.
        trained: The trained parameters by name. One with several names (a tied head) has one.
    """
    leaves = {id(model.get_parameter(name)) for name in trained}
    named = model.named_parameters(remove_duplicate=False)
    touched = {name for name, parameter in named if id(parameter) in leaves}
    tensors = list(model.state_dict())
    vision = in_vision(model, tensors)
    if not in_vision(model, touched):
        layers = _independent_layers(model, trained)
        if layers:
            behind = [*_prefixes(model, language_layers(model)[layers:]), *_heads(model)]
            front = _front(tensors, touched, behind)
            return Boundary("layers", layers, front)
        return Boundary("image features", 0, tuple(vision)) if vision else None
    tower = _tower(model)
    path = next(iter(_prefixes(model, [tower])), None)
    inside = [] if path is None else [name for name in tensors if name.startswith(path)]
    if not inside or touched.intersection(inside):
        return None
    return Boundary("vision tower", 0, tuple(inside))


def frozen_states(model: Any, boundary: Boundary, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return h(x), by the values that the model itself holds, without a graph.

    Args:
        model: A transformers model.
        boundary: Where h ends.
        inputs: The inputs of the base model, for "layers"; or those that belong to pictures.

    Returns:
        Hidden states [batch, seq, hidden] for "layers". Otherwise the features of all pictures:
        [tiles, tokens, width], or [tokens, width] where pictures differ in their tokens.

    Raises:
        ValueError: The model is in training mode, in which dropout and batch statistics would make
            every pass another one.
    """
    if model.training:
        raise ValueError(
            "expected a model in evaluation mode, found training mode, in which the activations of "
            "frozen layers are not the same in every pass; call model.eval()"
        )
    base = model.base_model
    with torch.no_grad():
        if boundary.place == "image features":
            features = base.get_image_features(**inputs, return_dict=True).pooler_output
            return features if isinstance(features, Tensor) else torch.cat(tuple(features))
        if boundary.place == "layers":
            last = language_layers(model)[boundary.layers - 1]
            return _output_of(last, lambda: base(**inputs, use_cache=False))
        return _output_of(
            _tower(model), lambda: base.get_image_features(**inputs, return_dict=True)
        )


@contextmanager
def going_on(model: Any, boundary: Boundary, states: Tensor) -> Iterator[None]:
    """Within this context, forward passes take ``states`` as h(x) and compute g alone.

    What is before the boundary and cheap, such as the lookup of embeddings, is computed and not
    used. With the place "layers" the inputs must hold no pictures.
    """
    with ExitStack() as stack:
        for owner, method, stand_in in _stand_ins(model, boundary, states):
            stack.callback(_restore, owner, method, owner.__dict__.get(method))
            setattr(owner, method, stand_in)
        yield


def _stand_ins(
    model: Any, boundary: Boundary, states: Tensor
) -> list[tuple[Any, str, Callable[..., Any]]]:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    def stored(*_: Any, **__: Any) -> Tensor:
        return states

    def passed_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    def features(*_: Any, **__: Any) -> Any:
        # transformers has them as one tensor, or as a list of [tokens, width] per picture.
        return BaseModelOutputWithPooling(pooler_output=states if states.dim() > 2 else (states,))

    def tower(*_: Any, **__: Any) -> Any:
        return BaseModelOutputWithPooling(last_hidden_state=states)

    if boundary.place == "image features":
        return [(model.base_model, "get_image_features", features)]
    if boundary.place == "vision tower":
        return [(_tower(model), "forward", tower)]
    *first, last = language_layers(model)[: boundary.layers]
    return [*((layer, "forward", passed_on) for layer in first), (last, "forward", stored)]


def _restore(owner: Any, method: str, own: Any) -> None:
    delattr(owner, method)
    if own is not None:
        setattr(owner, method, own)


class _Reached(Exception):
    """Ends a forward pass at the boundary."""

    def __init__(self, output: Any) -> None:
        self.output = output


def _output_of(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    """Return what a module gives within ``run``, which ends there."""

    def reached(_: nn.Module, __: Any, output: Any) -> None:
        raise _Reached(output)

    handle = module.register_forward_hook(reached)
    try:
        run()
    except _Reached as at:
        output: Tensor = getattr(at.output, "last_hidden_state", at.output)
        return output
    finally:
        handle.remove()
    raise ValueError(f"expected a model that calls its {type(module).__name__}, found no call")


def _independent_layers(model: Any, trained: Mapping[str, Tensor]) -> int:
    """Return how many first layers of the language model do not depend on trained parameters."""
    layers = language_layers(model)
    depends: list[bool] = []

    def note(_: nn.Module, __: Any, output: Any) -> None:
        depends.append(not isinstance(output, Tensor) or output.requires_grad)

    # The model's own memory, as leaves that require gradients.
    leaves = {name: model.get_parameter(name).detach().requires_grad_() for name in trained}
    ids = torch.zeros((1, 2), dtype=torch.long, device=model.device)
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        with torch.enable_grad():
            functional_call(model, leaves, (), {"input_ids": ids, "use_cache": False})
    finally:
        for handle in handles:
            handle.remove()
    if len(depends) != len(layers):  # A layer that is called twice has no one output.
        return 0
    return next((count for count, one in enumerate(depends) if one), len(depends))


def language_layers(model: Any) -> list[nn.Module]:
    """Return the layers of the language model in their order."""
    layers = getattr(model.get_decoder(), "layers", None)
    return list(layers) if isinstance(layers, nn.ModuleList) else []


def _tower(model: Any) -> nn.Module:
    """Return the vision tower, or the model itself if it has none."""
    tower: nn.Module = model.get_encoder(modality="image")
    return tower


def _heads(model: Any) -> list[str]:
    return _prefixes(model, [model.get_output_embeddings()])


def _prefixes(model: nn.Module, modules: Iterable[nn.Module]) -> list[str]:
    """Return the beginnings of the names of all that is in some modules of a model."""
    wanted = {id(module) for module in modules}
    return [f"{path}." for path, module in model.named_modules() if path and id(module) in wanted]


def _front(tensors: Iterable[str], touched: set[str], behind: Iterable[str]) -> tuple[str, ...]:
    later = tuple(behind)
    return tuple(name for name in tensors if name not in touched and not name.startswith(later))
