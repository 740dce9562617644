"""Arithmetic and naming on pytrees of tensors.

A tree is any nesting of dicts, lists, tuples and NamedTuples (optree's registry) with tensors
at the leaves; a bare tensor is a tree. A leaf may be ``None``, which stands for "nothing here"
(a frozen parameter has no gradient). Every function is pure, keeps the structure, and follows
autograd if the tensors do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import optree
import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

# Nested containers with tensors (or None) at the leaves, of a structure that is not known here.
if TYPE_CHECKING:
    Tree: TypeAlias = "Tensor | Mapping[str, Tree] | Sequence[Tree] | None"
else:  # typing cannot resolve an alias that names itself
    Tree = object

# A tree of a type that the caller knows, ``dict[str, Tensor]`` say, and gets back.
T = TypeVar("T")
TreeT = TypeVar("TreeT", bound=Tree)

# Above so many leaves on a device, kernels that take many tensors, a stretch of each at a time, are
# fewer than one per leaf.
_MANY = 64

_BLOCK = 1 << 18  # entries of one BLAS dot: off by 1e-6 of the norm of the products in float32

# The name of the only leaf of a tree that is a bare tensor.
ROOT_NAME = "value"


def leaves(tree: Tree) -> list[Tensor]:
    """Return the tensors of ``tree`` in its fixed order (dict keys sorted), without the Nones."""
    return [leaf for leaf in optree.tree_leaves(tree, none_is_leaf=True) if leaf is not None]


def map(fn: Callable[..., Any], tree: T, *rest: Tree) -> T:
    """Apply ``fn(leaf, *rest_leaves)``; where any of the leaves is None the result is None.

    Structure and type are those of ``tree`` as long as ``fn`` makes tensors of tensors.

    Raises:
        ValueError: The structures differ (optree's message names both).
    """
    leaves, structure = optree.tree_flatten(tree, none_is_leaf=True)
    columns = [structure.flatten_up_to(other) for other in rest]
    if not columns:
        mapped = [None if leaf is None else fn(leaf) for leaf in leaves]
    elif len(columns) == 1:  # the most frequent case, at half the time
        pairs = zip(leaves, columns[0], strict=True)
        mapped = [None if one is None or other is None else fn(one, other) for one, other in pairs]
    else:
        rows = zip(leaves, *columns, strict=True)
        mapped = [None if any(leaf is None for leaf in row) else fn(*row) for row in rows]
    result: T = structure.unflatten(mapped)
    return result


def zeros_like(tree: T, *, dtype: torch.dtype | None = None) -> T:
    """Return zeros of the same shapes and devices, in ``dtype`` if given."""
    return map(lambda leaf: torch.zeros_like(leaf, dtype=dtype, requires_grad=False), tree)


def add(left: T, right: T) -> T:
    """Return ``left + right``; a None on one side counts as zero."""
    return axpy(1.0, left, right)


def scale(factor: float | Tensor, tree: T) -> T:
    """Return ``factor * tree``."""
    return map(lambda leaf: leaf * factor, tree)


def axpy(factor: float | Tensor, x: T, y: T) -> T:
    """Return ``factor * x + y``; a None on one side counts as zero."""

    def combine(x_leaf: Tensor | None, y_leaf: Tensor | None) -> Tensor | None:
        if x_leaf is None:
            return y_leaf
        scaled = x_leaf * factor if isinstance(factor, Tensor) or factor != 1.0 else x_leaf
        return scaled if y_leaf is None else y_leaf + scaled

    combined: T = optree.tree_map(combine, x, y, none_is_leaf=True)
    return combined


def vdot(left: Tree, right: Tree) -> Num[Tensor, ""]:
    """Return ⟨left, right⟩ = Σ over all entries, a scalar; None leaves contribute nothing.

    16-bit leaves are multiplied and summed in float32. The sum is pairwise or in blocks, not one
    BLAS dot, whose float32 error grows with the length.
    """
    terms: list[Tensor] = []
    map(lambda x, y: terms.extend(dot_terms(x, y)), left, right)
    return total(terms, like=left)


def dot_terms(x: Tensor, y: Tensor) -> list[Tensor]:
    """Return scalars, at least float32, whose sum is ⟨x, y⟩: see ``vdot``."""
    alike = x.dtype is y.dtype or wide_dtype(x.dtype) == wide_dtype(y.dtype)
    if not alike or x.shape != y.shape or not (on_cpu(x) and on_cpu(y)):
        return [(_wide(x) * _wide(y)).sum()]
    # No product is stored: its new pages would cost more than the arithmetic.
    x, y = x.reshape(-1), y.reshape(-1)
    pieces = [(x, y)] if len(x) <= _BLOCK else zip(x.split(_BLOCK), y.split(_BLOCK), strict=True)
    return [torch.dot(_wide(a), _wide(b)) for a, b in pieces]


def on_cpu(x: Tensor) -> bool:
    """Return whether a tensor lies in the memory of the host, whole and of no other type."""
    return x.is_cpu and type(x) in (Tensor, torch.nn.Parameter)


def total(terms: list[Tensor], like: Tree) -> Tensor:
    """Return the sum of scalars, on the device of the first.

    If there are none it is a 0 of the precision and on the device of ``like``.
    """
    if not terms:
        first = next(iter(leaves(like)), None)
        return torch.zeros(()) if first is None else first.new_zeros(())
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def norm(tree: Tree) -> Float[Tensor, ""]:
    """Return the Euclidean norm of all entries together, a scalar (at least float32).

    For float32 and float64 leaves this is what ``torch.nn.utils.clip_grad_norm_`` computes.
    """
    tensors = leaves(tree)
    if not tensors:
        return torch.zeros(())
    if len(tensors) > _MANY and all(_norm_is_taken_together(leaf) for leaf in tensors):
        return torch.nn.utils.get_total_norm(tensors)  # without a graph
    norms = [torch.linalg.vector_norm(leaf, dtype=wide_dtype(leaf.dtype)) for leaf in tensors]
    together: Tensor = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    return together


def _norm_is_taken_together(leaf: Tensor) -> bool:
    if leaf.is_cpu or leaf.requires_grad or is_sharded(leaf):
        return False
    return leaf.dtype is wide_dtype(leaf.dtype)


def is_sharded(leaf: Tensor) -> bool:
    """Return whether a tensor is spread over a mesh of devices, as torch's ``DTensor`` is."""
    return hasattr(leaf, "device_mesh")


def allfinite(tree: Tree) -> Bool[Tensor, ""]:
    """Return a scalar bool tensor: no entry is infinite or NaN.

    On a device it is that of the largest magnitude, which takes a few kernels for all leaves.
    """
    tensors = leaves(tree)
    if tensors and all(leaf.is_floating_point() and not leaf.is_cpu for leaf in tensors):
        return torch.isfinite(torch.nn.utils.get_total_norm(tensors, math.inf))
    checks = [torch.isfinite(leaf).all() for leaf in tensors]
    if not checks:
        return torch.ones((), dtype=torch.bool)
    return torch.stack([check.to(checks[0].device) for check in checks]).all()


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by name, detached and in the memory of the host; their values do not change.

    Those of a device are copied together, so that the host waits for it once. Tensors of the CPU
    are not copied.
    """
    found = {name: tensor.detach() for name, tensor in tensors.items()}
    for device in {tensor.device for tensor in found.values() if not tensor.is_cpu}:
        there = {name: tensor for name, tensor in found.items() if tensor.device == device}
        pieces = [tensor.reshape(-1).view(torch.uint8) for tensor in there.values()]
        copied = torch.cat(pieces).cpu().split([len(piece) for piece in pieces])
        for (name, tensor), piece in zip(there.items(), copied, strict=True):
            found[name] = piece.clone().view(tensor.dtype).reshape(tensor.shape)
    return found


def names(tree: Tree, *, none_is_leaf: bool = False) -> list[str]:
    """Return one '/'-joined path per leaf, in leaf order.

    Dict keys, NamedTuple field names and sequence indices are the parts: ``first_moment/w``.

    Raises:
        ValueError: Two leaves have the same path (a dict key contains '/').
    """
    accessors = optree.tree_accessors(tree, none_is_leaf=none_is_leaf)
    paths = ["/".join(_part(entry) for entry in accessor) or ROOT_NAME for accessor in accessors]
    if len(set(paths)) != len(paths):
        clash = next(path for index, path in enumerate(paths) if path in paths[:index])
        raise ValueError(
            f"expected one path per leaf, found {clash!r} twice: rename the dict key that "
            "contains '/'"
        )
    return paths


def flatten(tree: Tree) -> dict[str, Tensor]:
    """Return ``{path: tensor}`` for a file of named tensors; None leaves are left out."""
    return dict(zip(names(tree), optree.tree_leaves(tree), strict=True))


def missing(part: Tree, whole: Tree) -> list[str]:
    """Return the paths of the leaves of ``whole`` that are None in ``part``, in leaf order."""
    if len(leaves(part)) == len(leaves(whole)):
        return []
    there = flatten(part).keys()
    return [name for name in names(whole) if name not in there]


def unflatten(named: Mapping[str, Tensor], example: TreeT) -> TreeT:
    """Rebuild the tree that ``flatten`` took apart.

    It has the structure of ``example``, None leaves included, and the tensors of ``named``.

    Raises:
        ValueError: A path of ``example`` is missing from ``named`` or the other way round, or a
            tensor differs from that of ``example`` in shape or dtype.
    """
    expected = flatten(example)
    missing, unexpected = sorted(expected.keys() - named.keys()), sorted(named.keys() - expected)
    if missing or unexpected:
        raise ValueError(
            f"expected the {len(expected)} paths of the example tree; missing {missing}, "
            f"unexpected {unexpected}: was it saved with another model or optimizer?"
        )
    for path, tensor in expected.items():
        value = named[path]
        if value.shape != tensor.shape or value.dtype != tensor.dtype:
            raise ValueError(
                f"{path}: expected {tensor.dtype} {tuple(tensor.shape)}, found {value.dtype} "
                f"{tuple(value.shape)}: was it saved with another model or precision?"
            )
    structure = optree.tree_structure(example)
    rebuilt: TreeT = optree.tree_unflatten(structure, [named[path] for path in expected])
    return rebuilt


def _part(entry: Any) -> str:
    """One step of a path: the field name for NamedTuples, else the key or index."""
    return str(getattr(entry, "field", entry.entry))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the precision to sum in: float32 for 16 bits, else the same."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(wide_dtype(tensor.dtype))
