"""What is optimised: pure functions of (lower parameters, upper parameters, batch)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeAlias, TypeGuard, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bilevel import tree
from bilevel.tree import T, Tree

Params: TypeAlias = Tree  # of floating-point tensors, usually dict[str, Tensor]

# Whatever the functions of the problem understand: the library hands it on and never looks into it.
Batch: TypeAlias = object
# A scalar, or a scalar and auxiliary outputs.
Loss: TypeAlias = Float[Tensor, ""] | tuple[Float[Tensor, ""], Any]

# What the user's functions take: lower parameters, upper parameters, a batch.
Lower = TypeVar("Lower", bound=Tree)
Upper = TypeVar("Upper", bound=Tree)
BatchT = TypeVar("BatchT")


@dataclass(frozen=True)
class BilevelProblem(Generic[Lower, Upper, BatchT]):
    """``min_φ upper_loss(θ*(φ), φ)`` with θ*(φ) reached by steps on ``lower_loss(θ, φ)``.

    Args:
        lower_loss: (lower_params, upper_params, batch) -> scalar, the mean over the examples, or
            (scalar, aux): any pytree, which reaches ``StepInfo.lower_aux`` detached.
        upper_loss: (lower_params, upper_params, batch) -> scalar or (scalar, aux), likewise.
        batch_size: Number of examples in a lower batch, by which micro-batches are weighted when
            a step is accumulated over several. None: they all count the same.

    The functions must be pure: no in-place change of parameters, no state but torch's random
    state, which is rewound for every pass of a step.
    """

    lower_loss: Callable[[Lower, Upper, BatchT], Loss]
    upper_loss: Callable[[Lower, Upper, BatchT], Loss]
    batch_size: Callable[[BatchT], int] | None = None


@dataclass(frozen=True)
class ReweightingProblem(Generic[Lower, Upper, BatchT]):
    """A bilevel problem whose upper parameters weight the examples of the lower loss.

    The lower loss is::

        lower_loss(θ, φ, batch) = (1/batch) Σ_i w_i(φ, features) ℓ_i(θ)

    Args:
        per_example_loss: (lower_params, batch) -> (losses [batch], features), the features being
            any pytree of tensors (or None) that ``weights`` may look at.
        weights: (upper_params, batch, features) -> weights [batch].
        upper_loss: (lower_params, upper_params, batch) -> scalar or (scalar, aux).
        detach_features: Whether weights are a function of φ alone, the features being data: the
            stop-gradient of Meta-Weight-Net. Features that depend on θ (the loss itself, say) then
            count as constants wherever the lower loss is differentiated. That is exact through one
            step, and leaves out how they change from step to step through several and at a
            solution. False: θ gets a gradient through the features, too, so that the lower problem
            is another one, and its hypergradient is whole; only the routes ``Jvp``, ``Reverse`` and
            ``CentralDifference`` apply. ``check_hypergradient`` measures what is left out.
        rows: batch -> {leading size: owner [leading size]}, for operations inside the model whose
            leading dimension is not the batch: image tiles, flattened tokens, scored positions.
            ``owner[r]`` is the index in the batch of the example that row r belongs to. Needed by
            the routes ``Ghost`` and ``PerExample``. A dimension that is not declared, and comes to
            have the size of the batch, is refused as one where examples influence each other is.

    Where examples of a micro-batch influence each other's losses (batch normalisation in training
    mode, contrastive terms), ``Ghost`` and ``PerExample`` do not apply: they know the operations
    that join rows, measure the others on the first step and for new shapes, and refuse; ``Auto``
    takes another route.
    """

    per_example_loss: Callable[[Lower, BatchT], tuple[Float[Tensor, " batch"], Any]]
    weights: Callable[[Upper, BatchT, Any], Float[Tensor, " batch"]]
    upper_loss: Callable[[Lower, Upper, BatchT], Loss]
    detach_features: bool = True
    rows: Callable[[BatchT], Mapping[int, Int[Tensor, " rows"]]] | None = None

    @cached_property
    def verdicts(self) -> dict[Hashable, str | None]:
        """What was measured of the per-example rules on this problem, by shapes.

        None where they are right, or why they are not. Filled by the routes that use them.
        """
        return {}

    def lower_loss(
        self, lower_params: Lower, upper_params: Upper, batch: BatchT
    ) -> Float[Tensor, ""]:
        """Return the weighted mean loss, a scalar."""
        losses, features = self.losses(lower_params, batch)
        return weighted_mean(self.weights_of(upper_params, batch, features, losses), losses)

    def losses(self, lower_params: Lower, batch: BatchT) -> tuple[Float[Tensor, " batch"], Any]:
        """Return checked per-example losses and features, detached if so declared.

        Raises:
            ValueError: Not a pair, or the losses are not a vector.
        """
        found: object = self.per_example_loss(lower_params, batch)
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise ValueError(
                f"per_example_loss: expected (losses [batch], features), found a "
                f"{type(found).__name__}; return (losses, None) where there are no features"
            )
        losses, features = found
        if not _is_real(losses) or losses.dim() != 1:
            kind = _described(losses)
            raise ValueError(
                f"per_example_loss: expected (losses [batch], features), found losses {kind}; "
                "reduce over everything but the examples"
            )
        if self.detach_features:
            features = tree.map(_detach, features)
        return losses, features

    def weights_of(
        self, upper_params: Upper, batch: BatchT, features: Any, losses: Float[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """Return the weights that go with these losses.

        Raises:
            ValueError: Not a tensor, or the shapes differ.
        """
        weights: object = self.weights(upper_params, batch, features)
        if not _is_real(weights) or weights.shape != losses.shape:
            found = _described(weights)
            raise ValueError(
                f"weights: expected one per loss, shape {tuple(losses.shape)}, found "
                f"{found if isinstance(weights, Tensor) else 'a ' + found}"
            )
        return weights


# A problem of parameters and batches that are handed on to its functions and not looked into.
Problem: TypeAlias = BilevelProblem[Any, Any, Any] | ReweightingProblem[Any, Any, Any]


def is_separable(problem: Problem) -> TypeGuard[ReweightingProblem[Any, Any, Any]]:
    """Return whether the weights of the losses are a function of φ alone, the features being data.

    Then ∇_θ L is the sum of the examples' gradients, each times its weight, and what φ has to do
    with it is in the weights.
    """
    return isinstance(problem, ReweightingProblem) and problem.detach_features


def weighted_mean(
    weights: Float[Tensor, " batch"], losses: Float[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """Return ``(1/batch) Σ_i w_i ℓ_i`` of weights and losses.

    The one place where the losses of a batch are reduced. The weights are not normalised: a batch
    whose weights are small takes a small step.
    """
    return (weights * losses).mean()


def dropped(
    weights: Float[Tensor, " batch"], losses: Float[Tensor, " batch"]
) -> Bool[Tensor, " batch"]:
    """Return which examples have no part in a step: weight exactly 0, and no finite loss.

    Their gradient is not finite either, and 0 times it is NaN.
    """
    return (weights == 0.0) & ~torch.isfinite(losses)


def lower_value(
    problem: Problem, lower_params: Params, upper_params: Params, batch: Batch
) -> tuple[Float[Tensor, ""], Any]:
    """Return the lower loss and what the user's function returned beside it (or None).

    Raises:
        ValueError: The loss is neither a scalar tensor nor (scalar tensor, aux).
    """
    return _value_and_aux(problem.lower_loss(lower_params, upper_params, batch), "lower_loss")


def upper_value(
    problem: Problem, lower_params: Params, upper_params: Params, batch: Batch
) -> tuple[Float[Tensor, ""], Any]:
    """Return the upper loss and what the user's function returned beside it (or None).

    Raises:
        ValueError: The loss is neither a scalar tensor nor (scalar tensor, aux).
    """
    return _value_and_aux(problem.upper_loss(lower_params, upper_params, batch), "upper_loss")


def detached(aux: T) -> T:
    """Return a pytree with its tensors detached; other leaves as they are."""
    return tree.map(_detach, aux)


def _value_and_aux(value: object, name: str) -> tuple[Float[Tensor, ""], Any]:
    loss, aux = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    if not _is_real(loss) or loss.dim() != 0:
        raise ValueError(
            f"{name}: expected a scalar tensor, found {_described(loss)}; return the mean, or "
            "(mean, aux)"
        )
    return loss, aux


def _is_real(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_floating_point()


def _described(value: object) -> str:
    """Return the shape of a tensor, and its dtype if that is not a floating one; else its type."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{tuple(value.shape)}" + ("" if value.is_floating_point() else f" of {value.dtype}")


def _detach(feature: Any) -> Any:
    return feature.detach() if isinstance(feature, Tensor) else feature
