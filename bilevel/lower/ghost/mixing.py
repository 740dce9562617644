"""Operations that compute entries from several rows of the batch.

Batch statistics, products of pairs, sums over a group: the loss of an example then depends on other
examples. Which ones, and whether on any at all, can depend on the data (a group without a second
member, a hinge, an adjacency of zeros), so that measuring one batch tells nothing of the next. So
these are told by the operation and by the dimension that the rows are in. What is not here, and
joins rows all the same, is found by measuring (``verification``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

# Whether a tensor is computed from the batch with a graph to the parameters.
Moves: TypeAlias = Callable[[Any], bool]
# Numbers of rows that an operation joins.
Sizes: TypeAlias = tuple[int, ...]

NONE: Sizes = ()


class Mixture(NamedTuple):
    """An operation that joined rows.

    Attributes:
        name: Its name.
        sizes: The numbers of rows; which of them are those of examples, the batch's size tells.
        placed: Whether the rows went where an index says, as those of tiles to their examples.
    """

    name: str
    sizes: Sizes
    placed: bool

    def joins(self, batch_size: int, owned: Collection[int]) -> bool:
        """Return whether rows of several examples may have been joined.

        Args:
            batch_size: The number of examples.
            owned: Numbers of rows of which the problem declares the examples.
        """
        if self.placed:
            return batch_size in self.sizes and batch_size not in owned
        return any(size == batch_size or size in owned for size in self.sizes)


def joined(
    moves: Moves, function: Any, arguments: Sequence[Any], named: Mapping[str, Any], result: Any
) -> Mixture | None:
    """Return what an operation joins; None if it goes row by row.

    Args:
        moves: Whether a tensor is computed from the batch, with a graph and with rows.
        function: torch's function.
        arguments: Its arguments.
        named: Its named arguments.
        result: What it returned.
    """
    check, sizes = _CHECKS.get(function), NONE
    if check is not None:
        sizes = check(moves, *arguments, **named)
    elif isinstance(result, Tensor) and not result.dim() and function not in _PICKS:
        values = (*arguments, *named.values())
        sizes = tuple(len(value) for value in values if moves(value))  # of all entries one number
    if not sizes:
        return None
    return Mixture(getattr(function, "__name__", str(function)), sizes, check is _gathered)


def _over(
    moves: Moves, input: Any, *arguments: Any, place: int = 0, default: Any = None, **named: Any
) -> Sizes:
    """Reductions, cumulated sums and the like, if they go over the leading dimension."""
    if not moves(input) or (arguments and isinstance(arguments[0], Tensor)):
        return NONE  # The latter: the larger one of two tensors, entry by entry.
    dims = named.get("dim", named.get("axis", arguments[place] if len(arguments) > place else None))
    if dims is None or isinstance(dims, bool | torch.dtype):
        dims = default
    if dims is None or dims in ((), []):
        return (len(input),)
    dims = dims if isinstance(dims, tuple | list) else (dims,)
    return (len(input),) if any(dim % input.dim() == 0 for dim in dims) else NONE


def _product(moves: Moves, left: Any, right: Any = None, *_: Any, **named: Any) -> Sizes:
    """Matrix products that contract rows, or multiply each row with each."""
    right = next((named[name] for name in _RIGHT if name in named), right)
    if moves(right) and right.dim() <= 2:
        return tuple(right.shape)
    if moves(left) and (left.dim() == 1 or (left.dim() == 2 and left.stride(0) < left.stride(1))):
        return (left.shape[-1],)  # a vector of numbers, or a transposed matrix
    return NONE


_RIGHT = ("other", "mat2", "vec", "vec2", "tensor2", "tensor", "weight", "x2")


def _added_product(moves: Moves, _: Any, left: Any, right: Any = None, **named: Any) -> Sizes:
    return _product(moves, left, right, **named)


def _einsum(moves: Moves, equation: Any, *operands: Any) -> Sizes:
    """Products in which the first index of an operand is not the first of the result."""
    tensors = (
        operands[0] if len(operands) == 1 and not isinstance(operands[0], Tensor) else operands
    )
    if not isinstance(equation, str) or "." in equation or len(tensors) != equation.count(",") + 1:
        return NONE
    left, arrow, out = equation.replace(" ", "").partition("->")
    if not arrow:
        out = "".join(sorted(i for i in {*left} - {","} if left.count(i) == 1))
    pairs = zip(left.split(","), tensors, strict=True)
    return tuple(len(t) for term, t in pairs if moves(t) and term[:1] != out[:1])


def _new_axis(moves: Moves, input: Any, key: Any) -> Sizes:
    """Rows moved to another dimension, where they meet those that are not."""
    first = key[0] if isinstance(key, tuple) and key else key
    return (len(input),) if first is None and moves(input) else NONE


def _unsqueezed(moves: Moves, input: Any, dim: int) -> Sizes:
    return (len(input),) if moves(input) and dim % (input.dim() + 1) == 0 else NONE


def _gathered(
    moves: Moves, _: Any, dim: int, index: Any, source: Any = None, *__: Any, **named: Any
) -> Sizes:
    """Rows that are added to, or put into, others by an index."""
    source = named.get("source", named.get("src", source))
    return (len(source),) if dim == 0 and moves(source) else NONE


def _statistics(moves: Moves, input: Any, *arguments: Any, **named: Any) -> Sizes:
    """Batch normalisation by the statistics of the batch."""
    training = named.get("training", arguments[4] if len(arguments) > 4 else False)
    return (len(input),) if training and moves(input) else NONE


def functions(*names: str, owners: Sequence[Any] = (torch, Tensor)) -> list[Any]:
    """Return torch's functions and methods of these names; ``torch.float`` is a dtype, not one."""
    found = [getattr(owner, name, None) for name in names for owner in owners]
    return [function for function in found if callable(function)]


_named = partial(functions, owners=(torch, Tensor, functional, torch.linalg))


def _checks() -> dict[Any, Callable[..., Sizes]]:
    """Return the check of each function."""
    # fmt: off
    over = [
        "sum", "nansum", "mean", "nanmean", "prod", "var", "std", "var_mean", "std_mean", "amax",
        "amin", "aminmax", "max", "min", "median", "nanmedian", "logsumexp", "cumsum", "cumprod",
        "cummax", "cummin", "logcumsumexp", "softmax", "log_softmax", "softmin",
    ]
    products = [
        "matmul", "mm", "mv", "dot", "vdot", "inner", "outer", "ger", "tensordot", "kron", "linear",
        "cdist", "__matmul__",
    ]
    gathered = [
        "index_add", "index_copy", "index_reduce", "scatter", "scatter_add", "scatter_reduce",
    ]
    # fmt: on
    table: dict[Any, Callable[..., Sizes]] = dict.fromkeys(_named(*over), _over)
    table |= dict.fromkeys(
        _named("norm", "vector_norm", "quantile", "kthvalue"), partial(_over, place=1)
    )
    table |= dict.fromkeys(_named("normalize"), partial(_over, place=1, default=1))
    table |= dict.fromkeys(_named("diff"), partial(_over, place=1, default=-1))
    table |= dict.fromkeys(_named(*products), _product)
    table |= dict.fromkeys(_named("addmm", "addmv"), _added_product)
    table |= dict.fromkeys(_named("einsum"), _einsum)
    table |= dict.fromkeys(_named("unsqueeze"), _unsqueezed)
    table |= dict.fromkeys(_named("batch_norm"), _statistics)
    table |= dict.fromkeys(_named(*gathered, *(f"{name}_" for name in gathered)), _gathered)
    table[Tensor.__getitem__] = _new_axis
    return table


_CHECKS = _checks()
# One entry of a tensor, which is of one row.
_PICKS = frozenset(_named("select", "squeeze", "reshape", "view", "clone", "to", "type_as"))
