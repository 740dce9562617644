"""Ranks that hold all parameters each and share the examples: ``Replicas``.

Every exchange begins with a header, which says where a rank stands and whether it has failed: an
error on one rank ends all of them with its sentence, and ranks at different places are an error and
not a hang.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import optree
import torch
from jaxtyping import Float
from torch import Tensor
from torch import distributed as dist

from bilevel import tree
from bilevel.collective import Mean, RankError, causes
from bilevel.tree import Tree, TreeT

T = TypeVar("T")

_BUCKET = 1 << 22  # entries that are summed in one message
_ALIGNED = 64  # entries: sums over a tensor may depend on how its memory is aligned
_LARGE = 1 << 12  # entries of a leaf from which it is worth counting those that are not zero
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PLACES = ("lower gradient", "upper gradient", "product", "figures", "agreement", "parameters")


@dataclass(frozen=True)
class Replicas:
    """Processes of ``torch.distributed`` that hold all parameters each, and share the examples.

    With R ranks of A micro-batches each a step is that of one process with R·A, up to the order of
    sums: examples weigh n_m / N over all ranks, whose parts may differ in size, and the ranks'
    parameters stay the same bit for bit. Traffic per lower step: the gradient of θ once, and once
    for each upper gradient and Hessian product; φ once for each mixed product, of a large table
    the entries that the step visits. 16-bit gradients are summed in float32.

    A loss that draws random numbers (dropout) draws those of its own rank: seed the ranks
    differently if they should not all draw the same.

    Args:
        upper_size: Part of an upper batch -> the number of examples that the upper loss is a mean
            over, by which the ranks' parts are weighted; 0: this rank has no part. None: the parts
            of all ranks count the same.
        group: The processes; None: all of them.

    Raises:
        RuntimeError: ``torch.distributed`` has not been initialised.
    """

    upper_size: Callable[[Any], int] | None = None
    group: dist.ProcessGroup | None = None

    in_place: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "Replicas: torch.distributed has no processes yet; call "
                "torch.distributed.init_process_group('gloo') first, in a script that torchrun "
                "starts"
            )

    @property
    def rank(self) -> int:
        """The number of this process in the group, from 0."""
        return dist.get_rank(self.group)

    @property
    def ranks(self) -> int:
        """The number of processes in the group."""
        return dist.get_world_size(self.group)

    @torch.no_grad()
    def mean(self, place: str, values: Tree, examples: int, like: Tree) -> Mean:
        """Return ``Σ_r (n_r / N) values_r`` over the ranks, and N."""
        leaves, structure, targets = _flat(values if examples else None, like)
        headers = self._meet(place, examples, _fingerprint(leaves))
        total = sum(header.size for header in headers)
        present = self._present(leaves, headers)
        factor = examples / total if total else 0.0
        return Mean(structure.unflatten(self._summed(leaves, targets, present, factor)), total)

    @torch.no_grad()
    def sum(self, values: TreeT, like: Tree, *, sparse: bool = False) -> TreeT:
        """Return ``Σ_r values_r``."""
        leaves, structure, targets = _flat(values, like)
        present = self._present(leaves, self._meet("product", 0, _fingerprint(leaves)))
        found = self._sparse_sums(leaves, targets, present) if sparse else {}
        dense = [here and index not in found for index, here in enumerate(present)]
        summed = self._summed(leaves, targets, dense, 1.0)
        result: TreeT = structure.unflatten(
            [found.get(index, leaf) for index, leaf in enumerate(summed)]
        )
        return result

    @torch.no_grad()
    def gathered(self, values: Float[Tensor, " _"]) -> list[Tensor]:
        """Return the vectors of all ranks in their order, padded for the exchange."""
        headers = self._meet("figures", len(values), _DTYPES.index(values.dtype))
        dtype = _DTYPES[min(header.detail for header in headers)]
        longest = max(header.size for header in headers)
        mine = values.new_zeros(longest, dtype=dtype)
        mine[: len(values)] = values
        parts = [torch.empty_like(mine) for _ in headers]
        if longest:
            called(lambda: dist.all_gather(parts, mine, group=self.group))
        return [part[: header.size] for part, header in zip(parts, headers, strict=True)]

    @torch.no_grad()
    def first(self, values: TreeT) -> TreeT:
        """Return the tensors of rank 0, in tensors of this rank."""
        self._check_names(values)

        def sent(leaf: Tensor) -> Tensor:
            return self._sent(leaf.detach().clone(memory_format=torch.contiguous_format))

        return tree.map(sent, values)

    @torch.no_grad()
    def adopt(self, values: TreeT) -> TreeT:
        """Return the tensors given, with the values of rank 0, in place."""
        self._check_names(values)

        def overwritten(leaf: Tensor) -> Tensor:
            if leaf.is_contiguous():
                return self._sent(leaf)
            return leaf.copy_(self._sent(leaf.contiguous()))

        return tree.map(overwritten, values)

    def _sent(self, leaf: Tensor) -> Tensor:
        """Return the tensor, with the values that it has on rank 0."""
        called(lambda: dist.broadcast(leaf, group=self.group, group_src=0))
        return leaf

    def _check_names(self, values: Tree) -> None:
        names = zlib.crc32("\0".join(tree.names(values, none_is_leaf=True)).encode())
        headers = self._meet("parameters", len(tree.leaves(values)), names)
        if len({header[2:] for header in headers}) > 1:
            raise RankError("the ranks hold parameters of different structure or names")

    def numbers(self, value: int, place: str = "agreement") -> list[int]:
        """Return the integers of all ranks in their order; ``place``: where they stand."""
        return [header.size for header in self._meet(place, value, 0)]

    def objects(self, value: T) -> list[T]:
        """Return the objects of all ranks in their order; pickled, so of no stranger."""
        self._meet("agreement", 0, 0)
        return self._objects(value)

    def upper_examples(self, batch: Any) -> int:
        """Return the number of examples of this rank's part."""
        return 1 if self.upper_size is None else self.upper_size(batch)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run the body; an error in it reaches the other ranks at their next exchange.

        Raises:
            RankError: Another rank has failed.
        """
        try:
            yield
        except Exception as error:
            if not _is_known(error):
                error.__dict__["_told_other_ranks"] = True
                self._fail(f"{type(error).__name__}: {error}")
            raise

    def _fail(self, reason: str) -> None:
        """Let the next exchange of the other ranks fail; nothing if they are gone."""
        try:
            self._meet("agreement", 0, 0, failed=reason)
        except RankError:
            return

    def _meet(self, place: str, size: int, detail: int, failed: str | None = None) -> list[_Header]:
        """Exchange headers.

        Raises:
            RankError: A rank has failed, is gone, or stands at another place.
        """
        mine = torch.tensor(
            [failed is not None, _PLACES.index(place), size, detail],
            dtype=torch.int64,
            device=self._device,
        )
        parts = [torch.empty_like(mine) for _ in range(self.ranks)]
        called(lambda: dist.all_gather(parts, mine, group=self.group))
        headers = [_Header(*row) for row in torch.stack(parts).tolist()]
        if any(header.failed for header in headers):
            reasons = enumerate(self._objects(failed))
            told = [f"rank {rank}: {reason}" for rank, reason in reasons if reason is not None]
            raise RankError("; ".join(told))
        if len({header.place for header in headers}) > 1:
            where = ", ".join(
                f"rank {rank} at the {_PLACES[header.place]}" for rank, header in enumerate(headers)
            )
            raise RankError(
                f"the ranks are at different places ({where}): give all of them the same number of "
                "lower steps, and an upper batch to all or to none"
            )
        return headers

    def _objects(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.ranks
        called(lambda: dist.all_gather_object(found, value, group=self.group))
        return found

    @property
    def _device(self) -> torch.device:
        """Where headers live: on the CPU if the group can send from there."""
        backend = dist.get_backend_config(self.group)
        if "cpu" in backend or "gloo" in backend or "mpi" in backend:
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def _present(self, leaves: Sequence[Tensor | None], headers: Sequence[_Header]) -> list[bool]:
        """Return which leaves any rank has."""
        mine = [leaf is not None for leaf in leaves]
        if len({header.detail for header in headers}) == 1:
            return mine
        flags = torch.tensor(mine, dtype=torch.int64, device=self._device)
        called(lambda: dist.all_reduce(flags, group=self.group))
        return [bool(count) for count in flags.tolist()]

    def _summed(
        self,
        leaves: Sequence[Tensor | None],
        targets: Sequence[Tensor | None],
        present: Sequence[bool],
        factor: float,
    ) -> list[Tensor | None]:
        """Return ``Σ_r factor_r leaf_r`` of every leaf that is present, in buckets."""
        result: list[Tensor | None] = [None] * len(leaves)
        for bucket in _buckets(targets, present):
            self._sum_bucket(bucket, leaves, factor, result)
        return result

    def _sum_bucket(
        self,
        bucket: Mapping[int, Tensor],
        leaves: Sequence[Tensor | None],
        factor: float,
        result: list[Tensor | None],
    ) -> None:
        """Sum the leaves of a bucket in one message; the tensors given are not changed."""
        places, length = {}, 0
        for index, like in bucket.items():
            places[index] = slice(length, length + like.numel())
            length += -(-like.numel() // _ALIGNED) * _ALIGNED
        first = next(iter(bucket.values()))
        flat = torch.zeros(length, dtype=tree.wide_dtype(first.dtype), device=first.device)
        for index, place in places.items():
            leaf = leaves[index]
            if leaf is not None:
                flat[place] = leaf.reshape(-1)
        if factor != 1.0:
            flat.mul_(factor)
        called(lambda: dist.all_reduce(flat, group=self.group))
        for index, like in bucket.items():
            result[index] = flat[places[index]].view(like.shape).to(like.dtype)

    def _sparse_sums(
        self,
        leaves: Sequence[Tensor | None],
        targets: Sequence[Tensor | None],
        present: Sequence[bool],
    ) -> dict[int, Tensor]:
        """Return the sums of those large leaves that take fewer bytes entry by entry."""
        large = {
            index: target
            for index, target in enumerate(targets)
            if target is not None and present[index] and target.numel() >= _LARGE
        }
        if not large:
            return {}
        indices = {index: _nonzero(leaves[index], target) for index, target in large.items()}
        mine = torch.tensor([len(places) for places in indices.values()], device=self._device)
        parts = [torch.empty_like(mine) for _ in range(self.ranks)]
        called(lambda: dist.all_gather(parts, mine, group=self.group))
        found = {}
        for (index, target), counts in zip(
            large.items(), torch.stack(parts).T.tolist(), strict=True
        ):
            width = tree.wide_dtype(target.dtype).itemsize
            # A ring sends every entry about twice, and a gathered entry has its index beside it.
            if max(counts) * self.ranks * (8 + width) < 2 * target.numel() * width:
                found[index] = self._sparse_sum(leaves[index], indices[index], counts, target)
        return found

    def _sparse_sum(
        self, leaf: Tensor | None, indices: Tensor, counts: Sequence[int], target: Tensor
    ) -> Tensor:
        """Return the sum of a leaf, rank after rank, from the entries that are not zero."""
        dtype, longest = tree.wide_dtype(target.dtype), max(counts)
        total = torch.zeros(target.numel(), dtype=dtype, device=target.device)
        if longest:
            places = torch.zeros(longest, dtype=torch.int64, device=target.device)
            values = torch.zeros(longest, dtype=dtype, device=target.device)
            places[: len(indices)] = indices
            if leaf is not None:
                values[: len(indices)] = leaf.reshape(-1)[indices].to(dtype)
            all_places = [torch.empty_like(places) for _ in counts]
            all_values = [torch.empty_like(values) for _ in counts]
            called(lambda: dist.all_gather(all_places, places, group=self.group))
            called(lambda: dist.all_gather(all_values, values, group=self.group))
            for place, value, count in zip(all_places, all_values, counts, strict=True):
                total[place[:count]] += value[:count]  # no place twice in one rank
        return total.view(target.shape).to(target.dtype)


@contextmanager
def apart() -> Iterator[None]:
    """Run the body; an error in it is told to no other rank: they may be where none listens."""
    try:
        yield
    except Exception as error:
        if not _is_known(error):
            error.__dict__["_apart"] = True
        raise


def is_apart(error: BaseException | None) -> bool:
    """Return whether an error left a rank apart from the others, which its process has to end."""
    return any("_apart" in one.__dict__ for one in causes(error))


def called(exchange: Callable[[], T]) -> T:
    """Return what an exchange of ``torch.distributed`` does.

    Raises:
        RankError: It failed: a process is gone, or did not answer in time.
    """
    try:
        return exchange()
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        ended = RankError(f"another rank is gone or does not answer ({first})")
        ended.gone = True
        raise ended from error


class _Header(NamedTuple):
    failed: int
    place: int
    size: int
    detail: int


def _is_known(error: BaseException | None) -> bool:
    """Return whether there is nothing to tell: an error is theirs, or told, or cannot be."""
    return is_apart(error) or any(
        isinstance(one, RankError) or "_told_other_ranks" in one.__dict__ for one in causes(error)
    )


def _flat(values: Tree, like: Tree) -> tuple[list[Tensor | None], Any, list[Tensor | None]]:
    """Return the leaves of the values, the structure, and the leaves that these are like."""
    targets, structure = optree.tree_flatten(like, none_is_leaf=True)
    leaves = [None] * len(targets) if values is None else structure.flatten_up_to(values)
    leaves = [
        None if target is None else leaf for leaf, target in zip(leaves, targets, strict=True)
    ]
    return leaves, structure, targets


def _fingerprint(leaves: Sequence[Tensor | None]) -> int:
    """Return a number that tells which leaves there are."""
    return zlib.crc32(bytes(leaf is not None for leaf in leaves))


def _nonzero(leaf: Tensor | None, like: Tensor) -> Tensor:
    """Return the places of the entries that are not zero (NaN is none), in the flattened leaf."""
    if leaf is None:
        return torch.zeros(0, dtype=torch.int64, device=like.device)
    return leaf.reshape(-1).nonzero().squeeze(1)


def _buckets(
    targets: Sequence[Tensor | None], present: Sequence[bool]
) -> Iterator[dict[int, Tensor]]:
    """Yield those that are present in groups of one dtype and device: one message each."""
    kinds: dict[tuple[torch.dtype, torch.device], dict[int, Tensor]] = {}
    for index, target in enumerate(targets):
        if target is None or not present[index]:
            continue
        bucket = kinds.setdefault((target.dtype, target.device), {})
        if bucket and sum(leaf.numel() for leaf in bucket.values()) + target.numel() > _BUCKET:
            yield kinds.pop((target.dtype, target.device))
            bucket = kinds.setdefault((target.dtype, target.device), {})
        bucket[index] = target
    yield from kinds.values()
