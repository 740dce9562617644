"""The torch function mode that intercepts every operation on a tracked parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bilevel import tree
from bilevel.autodiff.torch_private import transform_is_active
from bilevel.lower.ghost.context import Context, Tap, Tracked, Use
from bilevel.tree import Tree

_tap: Callable[..., Tensor] = Tap.apply


class Refusal(ValueError):
    """A parameter is used in a way for which there is no per-example rule."""


class Tracker(TorchFunctionMode):
    """A mode under which every use of a loss's parameters is tapped.

    The loss gets the parameters as leaves (``visible``), while the taps send gradients to other
    leaves (``collectors``). A gradient that reaches a visible leaf in the backward pass has
    bypassed the taps.

    Args:
        operations: Handlers by torch function. ``handler(tracker, *args, **kwargs)`` returns the
            operation's output or ``NotImplemented``.
        params: The parameters. The loss must be given ``visible`` instead.
        batch: The batch. Its integer tensors, and integer tensors computed from these, are known to
            have the examples in their leading dimension. With any other index, such as positions,
            the looked-up rows are a rearrangement of the parameter.
        context: The context of the micro-batch.
    """

    def __init__(
        self,
        operations: Mapping[Any, Callable[..., Any]],
        params: Tree,
        batch: Any,
        context: Context,
    ) -> None:
        super().__init__()
        self.visible: Tree = tree.map(lambda leaf: leaf.detach().requires_grad_(), params)
        self.collectors: Tree = tree.map(lambda leaf: leaf.detach().requires_grad_(), params)
        self._params = params
        self._operations = operations
        self._context = context
        self._reasons: list[str] = []
        self._rows: list[tuple[int, Callable[[], str]]] = []
        self._indices: list[Tensor] = [
            leaf for leaf in tree.leaves(batch) if isinstance(leaf, Tensor) and not _real(leaf)
        ]
        # The keys are identities of tensors, which ``Tracked`` or ``_indices`` keep alive.
        self._known: dict[int, Tracked | None] = dict.fromkeys(map(id, self._indices))
        leaves = zip(tree.leaves(self.visible), tree.leaves(self.collectors), strict=True)
        for leaf, (visible, collector) in enumerate(leaves):
            self._known[id(visible)] = Tracked(
                leaf, visible, visible.detach(), collector, lambda direction: direction
            )

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        known = self._known
        hit = index = False
        for value in (*args, *kwargs.values()) if kwargs else args:
            if id(value) in known:
                hit, index = hit or known[id(value)] is not None, True
            elif type(value) in (list, tuple):
                for item in value:
                    if id(item) in known:
                        hit, index = hit or known[id(item)] is not None, True
        if not index:
            return func(*args, **kwargs)
        if hit and torch.is_grad_enabled():
            return self._handle(func, args, kwargs)
        result = func(*args, **kwargs)
        if index and not hit and isinstance(result, Tensor) and not _real(result):
            self._known[id(result)] = None
            self._indices.append(result)
        return result

    # For the handlers in ``operations``.

    def find(self, value: Any) -> Tracked | None:
        """Return the entry of a tracked tensor, and None for anything else."""
        return self._known.get(id(value))

    def value(self, value: Any) -> Any:
        """Return a tracked tensor without its graph, and anything else unchanged."""
        entry = self._known.get(id(value))
        return value if entry is None else entry.value

    def indexes_examples(self, index: Tensor) -> bool:
        """Return whether this integer tensor comes from the batch."""
        return id(index) in self._known

    def tap(
        self,
        output: Tensor,
        use: Use,
        entries: Sequence[Tracked | None],
        saved: Sequence[Tensor] = (),
    ) -> Tensor:
        """Return ``output`` with a tap, through which the entries get their gradients."""
        present = [entry for entry in entries if entry is not None]
        shape = tuple(output.shape)

        def describe() -> str:
            names = [self._name(entry) for entry in present]
            return f"{names} give an output {shape} in {type(use).__name__}"

        self._rows.append((len(output), describe))
        return _tap(
            output,
            use,
            self._context,
            present,
            len(saved),
            *[tensor.detach() for tensor in saved],
            *[entry.shadow for entry in present],
        )

    def derive(
        self,
        entry: Tracked,
        transform: Callable[[Tensor], Any],
        tangent: Callable[[Tensor], Any] | None = None,
    ) -> Any:
        """Track the image of a parameter under a map, a tensor or a sequence of tensors.

        Args:
            entry: The entry of the parameter.
            transform: The map, which is linear or, if ``tangent`` is given, affine.
            tangent: The linear part of the map.
        """
        linear = transform if tangent is None else tangent
        visible = transform(entry.visible)
        if visible is entry.visible or (isinstance(visible, Tensor) and not visible.requires_grad):
            return visible  # Unchanged, or a cast to integers, which has no gradient.
        shadow = transform(entry.shadow)
        if isinstance(visible, Tensor):
            self._track(entry, visible, shadow, linear)
            return visible
        for position, (piece, piece_shadow) in enumerate(zip(visible, shadow, strict=True)):
            self._track(entry, piece, piece_shadow, partial(_piece, linear, position))
        return visible

    # For the pass that runs the loss.

    def refusal(self, batch_size: int, owners: Mapping[int, Tensor]) -> str | None:
        """Return why products per example cannot be computed, or None if they can."""
        if self._reasons:
            return self._reasons[0]
        for size, owner in owners.items():
            if owner.shape != (size,):
                return f"rows: expected owners of shape ({size},), found {tuple(owner.shape)}"
            natural = torch.arange(size, device=owner.device)
            if size == batch_size and not torch.equal(owner, natural):
                return (
                    f"rows: {size} rows are declared, and the batch has {size} examples too, but "
                    "not row by row; which is meant cannot be told from the size: pad the rows"
                )
        for size, describe in self._rows:
            if size != batch_size and size not in owners:
                return (
                    f"{describe()}: expected the {batch_size} examples (or the declared rows "
                    f"{sorted(owners)}) in the leading dimension, found {size}; move the examples "
                    "there, or declare in ReweightingProblem.rows which example each row is of, "
                    "or choose the route Jvp()"
                )
        return None

    def _track(
        self, entry: Tracked, visible: Tensor, shadow: Tensor, linear: Callable[[Tensor], Any]
    ) -> None:
        self._known[id(visible)] = Tracked(
            entry.leaf,
            visible,
            visible.detach(),
            shadow,
            lambda direction: linear(entry.tangent(direction)),
        )

    def _name(self, entry: Tracked) -> str:
        return tree.names(self._params)[entry.leaf]

    def _handle(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        handler = self._operations.get(func)
        transformed = transform_is_active()  # Taps do not work inside a transform.
        if handler is not None and not transformed:
            result = handler(self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if transformed or any(
            isinstance(item, Tensor) and item.requires_grad
            for item in (result if isinstance(result, tuple | list) else (result,))
        ):
            self._reasons.append(self._describe(func, args, kwargs))
        return result

    def _describe(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        values: list[Any] = []
        for value in (*args, *kwargs.values()):
            values.extend(value if isinstance(value, list | tuple) else [value])
        entries = [entry for value in values if (entry := self._known.get(id(value))) is not None]
        used = ", ".join(f"{self._name(entry)!r} {tuple(entry.value.shape)}" for entry in entries)
        shapes = [tuple(value.shape) for value in values if isinstance(value, Tensor)]
        name = getattr(func, "__qualname__", None) or getattr(func, "__name__", repr(func))
        return (
            f"no per-example rule for torch operation {name!r} with parameter {used} and tensors "
            f"of shapes {shapes}; write it with the operations listed in "
            "bilevel.lower.ghost.operations, leave the parameter out of the lower parameters "
            "(frozen), or choose the route Jvp()"
        )


def _real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _piece(linear: Callable[[Tensor], Any], position: int, direction: Tensor) -> Tensor:
    piece: Tensor = linear(direction)[position]
    return piece
