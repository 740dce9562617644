"""The torch function mode that intercepts every operation on a tracked parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Number
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bilevel import tree
from bilevel.autodiff.torch_private import transform_is_active
from bilevel.lower.ghost.context import Context, Direction, Tap, Tracked, Use
from bilevel.lower.ghost.origin import Origin, Origins
from bilevel.lower.guard import LOOKS, Guard
from bilevel.tree import Tree

_tap: Callable[..., Tensor] = Tap.apply
_DIFFERENTIATES = frozenset((torch.autograd.grad, torch.autograd.backward, Tensor.backward))


class Refusal(ValueError):
    """A parameter is used in a way for which there is no per-example rule."""


class Output(NamedTuple):
    """The output of an operation that has a tap.

    Attributes:
        leaves: The indices of the parameters that the operation takes.
        shape: Its shape.
        dtype: Its precision.
        reordered: Whether its rows are known to be the examples in another order.
        use: The name of the rule.
    """

    leaves: tuple[int, ...]
    shape: torch.Size
    dtype: torch.dtype
    reordered: bool
    use: str


class Tracker(TorchFunctionMode):
    """A mode under which every use of a loss's parameters is tapped.

    The loss gets the parameters as leaves (``visible``), while the taps send gradients to other
    leaves (``collectors``). A gradient that reaches a visible leaf in the backward pass has
    bypassed the taps.

    Args:
        operations: Handlers by torch function. ``handler(tracker, *args, **kwargs)`` returns the
            operation's output or ``NotImplemented``.
        params: The parameters. The loss must be given ``visible`` instead.
        batch: The batch. An operation with a parameter has a tap if its other operand is computed
            from the batch. With a constant it is an affine map of the parameter.
        context: The context of the micro-batch.

    Attributes:
        outputs: The outputs that have a tap, in the order of the operations.
        differentiated: Whether the loss contains a derivative with a graph of its own. Through the
            taps this has no graph to the parameters, and no gradient is right.
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
        self.outputs: list[Output] = []
        self.differentiated = False
        self._origins = Origins(batch)
        # The keys are identities of tensors, which ``Tracked`` keeps alive.
        self._known: dict[int, Tracked] = {}
        leaves = zip(tree.leaves(self.visible), tree.leaves(self.collectors), strict=True)
        for leaf, (visible, collector) in enumerate(leaves):
            self._track((leaf,), visible, collector, itemgetter(leaf))

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("create_graph") and func in _DIFFERENTIATES:
            self.differentiated = True
            self._reasons.append(
                "the loss contains a derivative with a graph (create_graph=True), which taps lack"
            )
        hit, origin = False, Origin.CONSTANT
        for value in (*args, *kwargs.values()) if kwargs else args:
            for item in value if type(value) in (list, tuple) else (value,):
                if id(item) in self._known:
                    hit = True
                elif isinstance(item, Tensor) and origin is not Origin.MIXED:
                    origin = max(origin, self._origins.of(item))
        if hit and torch.is_grad_enabled():
            result = self._handle(func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        if id(result) in self._known:
            return result
        return self._origins.pass_on(func, args, kwargs, origin, result)

    # For the handlers in ``operations``.

    def find(self, value: Any) -> Tracked | None:
        """Return the entry of a tracked tensor, and None for anything else."""
        return self._known.get(id(value))

    def value(self, value: Any) -> Any:
        """Return a tracked tensor without its graph, and anything else unchanged."""
        entry = self._known.get(id(value))
        return value if entry is None else entry.value

    def from_batch(self, *values: Any) -> bool:
        """Return whether one of these is a tensor that is computed from the batch."""
        return any(self.origin(value) is not Origin.CONSTANT for value in values)

    def origin(self, value: Any) -> Origin:
        """Return what is known of where an operand comes from."""
        return self._origins.of(value) if isinstance(value, Tensor) else Origin.CONSTANT

    def tap(
        self,
        output: Tensor,
        use: Use,
        entries: Sequence[Tracked | None],
        examples: Tensor,
        saved: Sequence[Tensor] = (),
    ) -> Tensor:
        """Return ``output`` with a tap, through which the entries get their gradients.

        Args:
            output: What the operation gives with the parameters' values.
            use: How its gradient is that of the parameters.
            entries: The parameters, None for those that are not tracked.
            examples: The operand from the batch, whose leading dimension is that of the output.
            saved: What the use needs in the backward pass.
        """
        present = [entry for entry in entries if entry is not None]
        leaves = tuple(leaf for entry in present for leaf in entry.leaves)
        reordered = self.origin(examples) is Origin.REORDERED
        self.outputs.append(
            Output(leaves, output.shape, output.dtype, reordered, type(use).__name__)
        )
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
        self, transform: Callable[..., Any], *entries: Tracked, tangent: Callable[..., Any]
    ) -> Any:
        """Track the image of parameters under a map, a tensor or a sequence of tensors.

        Args:
            transform: The map, which is affine.
            entries: The entries of the parameters, its arguments.
            tangent: The linear part of the map.
        """
        visible = transform(*[entry.visible for entry in entries])
        if any(visible is entry.visible for entry in entries):
            return visible  # Unchanged.
        if isinstance(visible, Tensor) and not visible.requires_grad:
            return visible  # A cast to integers, which has no gradient.
        shadow = transform(*[entry.shadow for entry in entries])
        moved = partial(_moved, entries, tangent)
        leaves = tuple(dict.fromkeys(leaf for entry in entries for leaf in entry.leaves))
        if isinstance(visible, Tensor):
            self._track(leaves, visible, shadow, moved)
            return visible
        for position, (piece, piece_shadow) in enumerate(zip(visible, shadow, strict=True)):
            self._track(leaves, piece, piece_shadow, partial(_piece, moved, position))
        return visible

    def affine(self, function: Callable[..., Any], *operands: Any) -> Any:
        """Track the image of parameters and constants under a function.

        Args:
            function: A function that is affine in all its operands together, apart from booleans
                and None.
            operands: Its operands, of which at least one is tracked and none is of the batch.
        """
        found = [self.find(operand) for operand in operands]
        if not all(isinstance(operand, Tensor | Number | None) for operand in operands):
            return NotImplemented  # An array, say.

        def filled(constants: Sequence[Any], images: Sequence[Tensor]) -> Any:
            remaining = iter(images)
            pairs = zip(constants, found, strict=True)
            return function(*[value if e is None else next(remaining) for value, e in pairs])

        entries = [entry for entry in found if entry is not None]
        kind = entries[0].value.device.type
        autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

        def tangent(*along: Tensor) -> Any:
            with torch.autocast(*autocast):
                return filled([_zero(operand) for operand in operands], along)

        return self.derive(lambda *images: filled(operands, images), *entries, tangent=tangent)

    # For the pass that runs the loss.

    def refusal(
        self, losses: Tensor, owners: Mapping[int, Tensor], guard: Guard = LOOKS
    ) -> str | None:
        """Return why products per example cannot be computed, or None if they can.

        Args:
            losses: Those of the examples, [batch].
            owners: The example of each row, by the number of rows.
            guard: Who decides what depends on values.
        """
        if self._reasons:
            return self._reasons[0]
        batch_size = len(losses)
        for size, owner in owners.items():
            if owner.shape != (size,):
                return f"rows: expected owners of shape ({size},), found {tuple(owner.shape)}"
            natural = torch.arange(size, device=owner.device)
            if size == batch_size and not guard.holds((owner == natural).all()):
                return (
                    f"rows: {size} rows are declared, and the batch has {size} examples too, but "
                    "not row by row; which is meant cannot be told from the size: pad the rows"
                )
        for output in self.outputs:
            size = output.shape[0] if output.shape else 0
            if size != batch_size and size not in owners:
                return (
                    f"{self._describe_output(output)}: expected the {batch_size} examples (or the "
                    f"declared rows {sorted(owners)}) in the leading dimension, found {size}; move "
                    "the examples there, or declare in ReweightingProblem.rows which example each "
                    "row is of"
                )
            if output.reordered and size not in owners:
                return (
                    f"{self._describe_output(output)}, whose rows are those of the batch in "
                    "another order, by an index, a sort or a flip; leave them in the batch's order"
                )
        of_losses = self.origin(losses)
        if of_losses is Origin.REORDERED:
            return (
                "the losses are those of the batch in another order, by an index, a sort or a "
                "flip; leave them in the batch's order"
            )
        for mixture in self._origins.mixtures if of_losses is Origin.MIXED else ():
            if mixture.joins(batch_size, owners):
                return (
                    f"examples may influence each other: {mixture.name!r} joins the rows of the "
                    "batch (batch statistics, pairs, a sum over examples)"
                )
        return None

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the batch's tensors, and of the outputs that have a tap."""
        return [
            *self._origins.shapes,
            *((*output.leaves, *output.shape) for output in self.outputs),
        ]

    def _track(
        self,
        leaves: tuple[int, ...],
        visible: Tensor,
        shadow: Tensor,
        tangent: Callable[[Direction], Tensor | None],
    ) -> None:
        self._known[id(visible)] = Tracked(leaves, visible, visible.detach(), shadow, tangent)
        self._origins.mark(visible, Origin.CONSTANT)

    def _names(self, leaves: Sequence[int]) -> list[str]:
        names = tree.names(self._params)
        return [names[leaf] for leaf in leaves]

    def _describe_output(self, output: Output) -> str:
        return f"{self._names(output.leaves)} give an output {tuple(output.shape)} in {output.use}"

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
        used = ", ".join(
            f"{'+'.join(self._names(entry.leaves))!r} {tuple(entry.value.shape)}"
            for entry in entries
        )
        shapes = [tuple(value.shape) for value in values if isinstance(value, Tensor)]
        name = getattr(func, "__qualname__", None) or getattr(func, "__name__", repr(func))
        return (
            f"no per-example rule for torch operation {name!r} with parameter {used} and tensors "
            f"of shapes {shapes}; write it with the operations listed in "
            "bilevel.lower.ghost.operations, or leave the parameter out of the lower parameters "
            "(frozen)"
        )


def _moved(entries: Sequence[Tracked], tangent: Callable[..., Any], direction: Direction) -> Any:
    """Return how the image of the entries moves with a direction; None if it does not."""
    found = [entry.tangent(direction) for entry in entries]
    if all(along is None for along in found):
        return None
    pairs = zip(found, entries, strict=True)
    return tangent(*[torch.zeros_like(e.value) if d is None else d for d, e in pairs])


def _zero(operand: Any) -> Any:
    """Return what a constant adds to the linear part of an affine map."""
    if isinstance(operand, Tensor):
        return operand if operand.dtype is torch.bool else torch.zeros_like(operand)
    return 0 if isinstance(operand, Number) and not isinstance(operand, bool) else operand


def _piece(moved: Callable[[Direction], Any], position: int, direction: Direction) -> Tensor | None:
    pieces = moved(direction)
    return None if pieces is None else pieces[position]
