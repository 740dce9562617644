"""Which tensors of a loss come from the batch, and whether their rows are still the examples.

A rule per example needs an operand whose leading dimension runs over the examples (or over the
rows that the problem declares). Size alone cannot tell it from that of a frozen weight, a mask or
an anchor. So every tensor that an operation computes from the batch is marked, and what is not
marked is a constant. A constant that is computed past torch's functions (by numpy, say) is safe:
an operation of it and a parameter is an affine map of the parameter, whatever its value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bilevel.lower.ghost.mixing import Mixture, functions, joined

# Set on tensors between operations; a table of them by identity would keep all of them alive.
_ATTRIBUTE = "_bilevel_origin"


class Origin(IntEnum):
    """What is known of a tensor; of several, what is known of them together is the largest.

    ``CONSTANT``: it is not computed from the batch. ``EXAMPLES``: it is, and no operation in sight
    has put its rows into another order. ``REORDERED``: one has. ``MIXED``: one has computed entries
    from several rows, with a graph (``mixing``).
    """

    CONSTANT = 0
    EXAMPLES = 1
    REORDERED = 2
    MIXED = 3


class Origins:
    """The origins of the tensors of one run of a loss.

    Args:
        batch: The batch, whose tensors have the examples in their leading dimension. If it has
            none, the loss has its data from elsewhere, and every tensor may be of the examples.
    """

    def __init__(self, batch: Any) -> None:
        self._given = list(tensors_in(batch))
        self._run = object()  # Marks of an earlier run, on a tensor that a module keeps, are void.
        self._known = dict.fromkeys(map(id, self._given), Origin.EXAMPLES)
        self._default = Origin.CONSTANT if self._given else Origin.EXAMPLES
        self.mixtures: list[Mixture] = []

    def of(self, tensor: Tensor) -> Origin:
        """Return the origin of a tensor.

        One that has a graph, but that no operation in sight has returned, comes from a custom
        ``autograd.Function``, a transform or a compiled module, whose arguments are not seen.
        """
        mark = getattr(tensor, _ATTRIBUTE, None)
        if mark is not None and mark[0] is self._run:
            found: Origin = mark[1]
            return found
        given = self._known.get(id(tensor))
        if given is None and tensor.requires_grad and not tensor.is_leaf:
            return Origin.EXAMPLES
        return self._default if given is None else given

    def of_examples(self, tensor: Tensor) -> bool:
        """Return whether a tensor is known to have the examples, in whatever order.

        Data that the loss holds itself are not: to look up rows of them picks the examples.
        """
        mark = getattr(tensor, _ATTRIBUTE, None)
        known = mark is not None or id(tensor) in self._known or not tensor.is_leaf
        return known and self.of(tensor) is not Origin.CONSTANT

    def _moves(self, value: Any) -> bool:
        """Return whether a value has rows of the batch, with a graph to the parameters."""
        if not isinstance(value, Tensor) or not value.requires_grad or not value.dim():
            return False
        return self.of(value) is not Origin.CONSTANT

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the batch's tensors."""
        return [tuple(tensor.shape) for tensor in self._given]

    def mark(self, result: Any, origin: Origin) -> None:
        """Give a tensor, or each in a sequence, its origin."""
        if isinstance(result, Tensor):
            if id(result) not in self._known:
                setattr(result, _ATTRIBUTE, (self._run, origin))
        elif isinstance(result, tuple | list):
            for item in result:
                self.mark(item, origin)

    def pass_on(
        self,
        function: Any,
        arguments: Sequence[Any],
        named: Mapping[str, Any],
        origin: Origin,
        result: Any,
    ) -> Any:
        """Give the result of an operation its origin, and return it.

        Args:
            function: torch's function.
            arguments: Its arguments.
            named: Its named arguments.
            origin: The largest origin of its arguments.
            result: What it returned.
        """
        if function is Tensor.__iter__:
            rows = list(result)
            self.mark(rows, origin)
            return iter(rows)
        if origin is Origin.CONSTANT:
            if isinstance(result, Tensor) and result.requires_grad:
                self.mark(result, origin)
            return result
        written = arguments[0] if result is None and arguments else result
        if not isinstance(written, Tensor | tuple | list):
            return result
        if function in _NEW_VALUES:
            return result
        if function in _CASTS_LIKE:
            origin = self.of(arguments[0])
        elif origin is Origin.EXAMPLES and function in _MAY_REORDER:
            moved = _MAY_REORDER[function](self, *arguments, **named)
            origin = Origin.REORDERED if moved else origin
        elif origin is Origin.REORDERED and self._only_filled(arguments, named, written):
            origin = Origin.EXAMPLES
        if torch.is_grad_enabled() and (
            mixture := joined(self._moves, function, arguments, named, result)
        ):
            self.mixtures.append(mixture)
            origin = Origin.MIXED
        self.mark(written, origin)
        if isinstance(written, Tensor) and arguments and written is arguments[0]:
            self.mark(written._base, origin)  # written in place, into a view
        return result

    def _only_filled(self, arguments: Sequence[Any], named: Mapping[str, Any], result: Any) -> bool:
        """Return whether reordered rows went into entries of a result that has other rows.

        Features of image tiles are written into sequences of tokens, say.
        """
        if not isinstance(result, Tensor):
            return False
        of_rows = [
            self.of(item)
            for value in (*arguments, *named.values())
            for item in (value if isinstance(value, tuple | list) else (value,))
            if isinstance(item, Tensor) and item.shape[:1] == result.shape[:1]
        ]
        return max(of_rows, default=Origin.CONSTANT) is Origin.EXAMPLES


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield the tensors in nested containers, mappings of any kind, dataclasses and objects."""
    if isinstance(value, Tensor):
        yield value
        return
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, str | type | torch.nn.Module):
        return
    seen.add(id(value))
    items: Iterable[Any] = vars(value).values() if hasattr(value, "__dict__") else ()
    if isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        items = value
    for item in items:
        yield from tensors_in(item, seen)


def _indexes(origins: Origins, tensor: Tensor, key: Any) -> bool:
    """Return whether ``tensor[key]`` may have other rows than the tensor."""
    keys = key if isinstance(key, tuple) else (key,)
    indices = [torch.as_tensor(item) for item in keys if isinstance(item, Tensor | list)]
    if not keys or not isinstance(keys[0], Tensor | list):
        return False
    broadcast = max(index.dim() for index in indices)
    return _picks(origins, tensor, 0, indices[0], broadcast)


def _picks(
    origins: Origins, tensor: Tensor, dim: int, index: Tensor, broadcast: int | None = None
) -> bool:
    """Return whether looking up this index along a dimension may give other rows.

    Args:
        origins: The origins.
        tensor: Where it is looked up.
        dim: Along which dimension.
        index: The index.
        broadcast: The number of dimensions of all indices together; None: those of this one.
    """
    if not origins.of_examples(tensor) or dim % max(tensor.dim(), 1):
        return False
    if index.dtype in (torch.bool, torch.uint8):
        return not bool(index.all())
    if index.shape[:1] != tensor.shape[:1] or index.dim() != (broadcast or index.dim()):
        return True
    rows = torch.arange(len(index), device=index.device).reshape(-1, *[1] * (index.dim() - 1))
    return not bool((index == rows).all())


def _looks_up(origins: Origins, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> bool:
    """Return whether an embedding's rows come from a tensor of the batch."""
    return _picks(origins, weight, 0, input)


def _along(_: Origins, input: Tensor, *arguments: Any, place: int = 0, **named: Any) -> bool:
    """Return whether an operation that moves entries along dimensions moves rows."""
    dims = named.get("dim", named.get("dims"))
    if dims is None:
        dims = arguments[place] if len(arguments) > place else -1
    dims = dims if isinstance(dims, tuple | list) else (dims,)
    return any(not isinstance(dim, int) or dim % max(input.dim(), 1) == 0 for dim in dims)


_Check = Callable[..., bool]


def _reordering() -> dict[Any, _Check]:
    """Return what may put the rows of the batch into another order, with the check whether it does.

    The order that these give can depend on the data, so that no check at another step would see it.
    Operations that move the examples to another dimension always do so, and are left to that check.
    """
    table: dict[Any, _Check] = {Tensor.__getitem__: _indexes, functional.embedding: _looks_up}
    table |= dict.fromkeys(functions("index_select"), _picks)
    for names, place in (
        (("gather", "sort", "argsort", "flip"), 0),
        (("take_along_dim", "topk", "roll"), 1),
    ):
        table |= dict.fromkeys(functions(*names), partial(_along, place=place))
    return table


_MAY_REORDER = _reordering()

# These take shape, precision and device of a tensor, and not its values.
_NEW_VALUES = frozenset(
    functions(
        *(f"new_{kind}" for kind in ("empty", "full", "ones", "tensor", "zeros")),
        *(f"{kind}_like" for kind in ("empty", "full", "ones", "zeros")),
        *(f"{kind}_like" for kind in ("rand", "randint", "randn")),
    )
)
_CASTS_LIKE = frozenset(functions("to", "type_as"))
