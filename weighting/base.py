"""What a weighting is: learnable parameters, and how a batch of examples gets its weights.

A weighting maps raw weights, any real numbers, through a bound to weights in a stated range. It
differs from others in where the raw weights come from: a table holds one per instance or per
domain, a net computes them from features. Everything else asks a weighting only what is written
here, so a fourth one is one new module.

Keys of a batch that a weighting may read, each a tensor:

    ===================  ==============================  =======================================
    ``index``            [batch] int64                   row of the example in the training file
    ``domain``           [batch] int64                   number of the example's domain
    ``labels``           [batch, steps] float            step labels in [0, 1]; NaN: none
    ``step_mask``        [batch, steps] bool             which steps exist
    ``attention_mask``   [batch, tokens] int64           1 for a token, 0 for padding
    ``step_probs``       [batch, steps] float            p("+") under the model as it is now
    ``reference_probs``  [batch, steps] float            p("+") under the initial model
    ``gradient``         [batch, components] float       features of the gradient of its loss
    ``features``         [batch, steps, features] float  chosen step and example features
    ``feature_mask``     [batch, steps] bool             steps whose features count
    ===================  ==============================  =======================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from weighting.bounds import Bound

Params: TypeAlias = Mapping[str, Tensor]
"""Parameters of a weighting, by name."""

Batch: TypeAlias = Mapping[str, Tensor]
"""A batch of examples, by the keys above."""

EXAMPLE_KEYS = frozenset({"index", "domain", "labels", "step_mask"})
"""Keys that are known of an example without tokenising it and without a model."""

MODEL_KEYS = frozenset({"step_probs", "reference_probs", "features", "feature_mask"})
"""Keys whose values come from a process reward model."""


@runtime_checkable
class Weighting(Protocol):
    """Maps examples to instance weights; a frozen dataclass of its configuration.

    All fields but ``bound`` are numbers, booleans or strings: they are what ``save_weighting``
    writes, beside the parameters, the names of the rows, and what the caller needs to make the
    batches again (``extra``).

    Attributes:
        reads: Keys of a batch that ``batch_weights`` and ``file_weights`` read.
        row_key: What the parameters hold a row for: every instance ("index"), every domain, or
            None. The rows are named after the ids, or the domains, of the training file; without a
            row an example cannot be weighed. An upper step visits few of the rows of instances, and
            is taken to visit all other parameters.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    reads: ClassVar[tuple[str, ...]]
    row_key: ClassVar[Literal["index", "domain"] | None]

    @property
    def bound(self) -> Bound:
        """Map from raw weights to weights."""

    @property
    def size(self) -> int:
        """Number of rows; 0 without a ``row_key``."""

    @property
    def start(self) -> float:
        """Weight of every example before the first upper step, in the units of the bound."""

    def init(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Initial parameters, under which all examples weigh ``start``.

        Args:
            generator: Draws what is random in them; None: torch's global generator.
        """

    def batch_weights(self, params: Params, batch: Batch) -> Float[Tensor, " batch"]:
        """Weights of the examples of a lower-level batch, as the training loss is multiplied.

        Differentiable in ``params``. Any normalisation is over the batch, or over all rows.

        Args:
            params: Parameters of the weighting.
            batch: Holds the keys in ``reads``.

        Raises:
            ValueError: These weights cannot be normalised.
        """

    def file_weights(
        self, params: Params, batches: Iterable[Batch]
    ) -> tuple[Float[Tensor, " examples"], Float[Tensor, " examples"]]:
        """Weights and raw weights of the examples of a whole file, which compares them.

        Args:
            params: Parameters of the weighting, detached.
            batches: The examples of the file in order, in batches that hold the keys in ``reads``.

        Returns:
            Weights, normalised over the file (or over all rows) instead of over a batch; raw
            weights, before the bound.

        Raises:
            ValueError: These weights cannot be normalised.
        """

    def project(self, params: Params) -> Params:
        """Nearest parameters whose raw weights lie where the bound is not flat; idempotent.

        Follows every upper step (``Projected`` of ``bilevel``): a raw weight that overshot the
        bound must not have to travel back before its weight moves. ``params`` themselves where
        nothing has to be projected.
        """

    def share_at_bound(
        self, params: Params, weights: Float[Tensor, " batch"], tolerance: float = 0.01
    ) -> float:
        """Share of the weights that are at an end of the bound, in [0, 1].

        Args:
            params: Parameters of the weighting, whose rows are looked at where there are any.
            weights: Weights of the last batch, looked at where there are no rows.
            tolerance: A weight counts as at an end within this share of the bound's width.

        Returns:
            The share; 0 for a bound with an infinite range.
        """


def reads_model(weighting: Weighting) -> bool:
    """Whether the weights of an example depend on what a process reward model says of it."""
    return not MODEL_KEYS.isdisjoint(weighting.reads)
