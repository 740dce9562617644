"""One process, or several whose sums are one: the seam at which a run is spread over ranks.

Every rank holds θ, φ and the states of both optimizers, and takes its part of the micro-batches of
a lower step and of the upper batch. Three sums make the parts one step: at the end of the lower
gradient, of the upper gradient, and of each product with a second derivative of the lower loss. The
routes know nothing of it: what they compute per example they compute on the rank of the example,
before the sum, so that ``Dot`` meets μ with each rank's own gradient, and ranks on which ``Auto``
takes different routes still join in the same sums. What follows the sums is computed on every rank
from the same bits.

``Alone`` returns what it is given; ``bilevel.replicas`` speaks to ``torch.distributed``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

from jaxtyping import Float
from torch import Tensor

from bilevel.tree import Tree, TreeT

T = TypeVar("T")


class RankError(RuntimeError):
    """Another rank has failed, has gone, or stands at another place than this one.

    Attributes:
        gone: Whether it has gone, so that there are no more exchanges.
    """

    gone = False


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it was raised from, each once: it may be raised from itself."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__


class Mean(NamedTuple):
    """A mean over the examples of all ranks, and their number."""

    value: Any
    examples: int


class Collective(Protocol):
    """What a solver asks of the ranks; every rank must ask for the same in the same order."""

    @property
    def in_place(self) -> bool:
        """Whether θ must live in place, as in ``ResidentSolver``."""

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""

    @property
    def ranks(self) -> int:
        """How many processes there are."""

    def mean(self, place: str, values: Tree, examples: int, like: Tree) -> Mean:
        """Return ``Σ_r (n_r / N) values_r`` over the ranks, and N.

        Args:
            place: Where the ranks stand, "lower gradient" say.
            values: The mean over the examples of this rank; None leaves are zero.
            examples: n_r; with 0 the values are not looked at.
            like: A tree with the shapes, dtypes and devices of the values.
        """

    def sum(self, values: TreeT, like: Tree, *, sparse: bool = False) -> TreeT:
        """Return ``Σ_r values_r``; None where no rank has a value.

        Args:
            values: What this rank adds; None leaves are zero.
            like: A tree with the shapes, dtypes and devices of the values.
            sparse: Whether large leaves may be mostly zero, of which then the other entries alone
                are sent: the rows of a table that the batches of the step hold.
        """

    def gathered(self, values: Float[Tensor, " _"]) -> list[Tensor]:
        """Return the vectors of all ranks, which may differ in length, in the order of the ranks.

        All on the device of this rank's, in the widest of their dtypes.
        """

    def first(self, values: TreeT) -> TreeT:
        """Return the tensors of rank 0."""

    def adopt(self, values: TreeT) -> TreeT:
        """Return the tensors given, with the values of rank 0, or θ in shards as it is.

        Args:
            values: Tensors of the caller's own, which may change in place.
        """

    def numbers(self, value: int) -> list[int]:
        """Return the integers of all ranks, in the order of the ranks: the cheapest exchange."""

    def objects(self, value: T) -> list[T]:
        """Return the objects of all ranks, which must be picklable, in the order of the ranks."""

    def upper_examples(self, batch: Any) -> int:
        """Return how many examples this rank's part of an upper batch has, which weigh it."""

    def together(self) -> AbstractContextManager[None]:
        """Run the body, and tell the other ranks if it fails, which then fail too."""


@dataclass(frozen=True)
class Alone:
    """One process: nothing is summed, and no bit changes."""

    in_place: ClassVar[bool] = False
    rank: ClassVar[int] = 0
    ranks: ClassVar[int] = 1

    def mean(self, place: str, values: Tree, examples: int, like: Tree) -> Mean:
        """Return the values and ``examples``."""
        return Mean(values, examples)

    def sum(self, values: TreeT, like: Tree, *, sparse: bool = False) -> TreeT:
        """Return the values."""
        return values

    def gathered(self, values: Float[Tensor, " _"]) -> list[Tensor]:
        """Return the vector, alone."""
        return [values]

    def first(self, values: TreeT) -> TreeT:
        """Return the values."""
        return values

    def adopt(self, values: TreeT) -> TreeT:
        """Return the values."""
        return values

    def numbers(self, value: int) -> list[int]:
        """Return the integer, alone."""
        return [value]

    def objects(self, value: T) -> list[T]:
        """Return the object, alone."""
        return [value]

    def upper_examples(self, batch: Any) -> int:
        """Return 1: the upper batch is whole."""
        return 1

    def together(self) -> AbstractContextManager[None]:
        """Return a context that does nothing."""
        return nullcontext()


ALONE = Alone()
