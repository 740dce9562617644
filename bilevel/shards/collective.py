"""Ranks that hold a shard of θ each, and share the examples: ``Shards``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import tree
from bilevel.collective import Mean
from bilevel.replicas import Replicas, apart
from bilevel.shards.module import ShardedModule
from bilevel.tree import Tree, TreeT

T = TypeVar("T")


@dataclass(frozen=True)
class Shards:
    """Processes of ``torch.distributed`` that hold a shard of θ, of its gradient and moments each.

    For ``ResidentSolver`` with ``OneStep(Dot(), "upper-first")`` and a model that ``fully_shard``
    has spread: R ranks of A micro-batches of one example each take the step of one process with
    R·A, up to the order of sums. φ is whole on every rank. A rank holds 1/R of what
    ``ResidentSolver`` holds, and beside it, of one module at a time of those that ``fully_shard``
    was called on, whole parameters, gradient, and what is exchanged.

    Traffic per pass, with θ of P entries: P for the forward pass and P for the backward pass, as
    ``fully_shard`` gathers parameters, and P for the gradients, by an all-to-all in place of the
    reduce-scatter. Of φ what ``Replicas`` sends.

    Every rank needs examples of its own in every micro-batch and in the upper batch, and the same
    calls of the module in the same order. An error in a pass cannot be told to the other ranks,
    which wait in an exchange of parameters; it ends them when its process ends.

    Args:
        module: What ``sharded(module)`` returned.
        upper_size: As of ``Replicas``.

    Attributes:
        replicas: What joins φ and figures.
    """

    module: ShardedModule
    upper_size: Callable[[Any], int] | None = None
    replicas: Replicas = field(init=False, repr=False)

    in_place: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "replicas", Replicas(self.upper_size, self.module.group))

    @property
    def rank(self) -> int:
        """The number of this process in the group, from 0."""
        return self.replicas.rank

    @property
    def ranks(self) -> int:
        """The number of processes in the group."""
        return self.replicas.ranks

    def mean(self, place: str, values: Tree, examples: int, like: Tree) -> Mean:
        """Refuse: gradients of shards are joined inside their own passes.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"Shards: the {place} of a sharded module is not computed by this solver; choose "
            "ResidentSolver"
        )

    def sum(self, values: TreeT, like: Tree, *, sparse: bool = False) -> TreeT:
        """Return ``Σ_r values_r``, of trees like φ."""
        return self.replicas.sum(values, like, sparse=sparse)

    def gathered(self, values: Float[Tensor, " _"]) -> list[Tensor]:
        """Return the vectors of all ranks in their order."""
        return self.replicas.gathered(values)

    def first(self, values: TreeT) -> TreeT:
        """Return the tensors of rank 0."""
        return self.replicas.first(values)

    def adopt(self, values: TreeT) -> TreeT:
        """Return θ as it is: each rank has its own shards.

        Raises:
            ValueError: They are not the module's.
        """
        given: Any = values
        self.module.check_own(given)
        return values

    def numbers(self, value: int) -> list[int]:
        """Return the integers of all ranks in their order."""
        return self.replicas.numbers(value)

    def objects(self, value: T) -> list[T]:
        """Return the objects of all ranks in their order; pickled, so of no stranger."""
        return self.replicas.objects(value)

    def upper_examples(self, batch: Any) -> int:
        """Return the number of examples of this rank's part."""
        return self.replicas.upper_examples(batch)

    def together(self) -> AbstractContextManager[None]:
        """Return a context whose errors are not told to the other ranks: see the class."""
        return apart()

    @torch.no_grad()
    def norm(self, values: Tree) -> Float[Tensor, ""]:
        """Return the Euclidean norm of a tree like θ over the shards of all ranks."""
        norms = torch.cat(self.gathered(tree.norm(values)[None]))
        together: Tensor = torch.linalg.vector_norm(norms)
        return together
