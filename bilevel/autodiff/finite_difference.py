"""Central differences along a direction, with a step size for the precision of the parameters.

The parameters are never changed: the loss function gets shifted copies. Libraries that shift the
weights in place and back (Betty's darts) do not restore the same bits in 16-bit precision, and
leave NaN in them if the direction is not finite.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import optree
import torch
from torch import Tensor

from bilevel import tree
from bilevel.autodiff.stop_gradients import Constant, StopGradients, equal
from bilevel.problem import Params
from bilevel.tree import Tree

HALF = (torch.float16, torch.bfloat16)

# Parts of torch's error messages about operands of different precision.
MISMATCH = ("dtype", "scalar type", "should be the same")


_OPAQUE = (
    "route CentralDifference(): the loss has a custom autograd.Function, or stops gradients within "
    "a transform of torch.func. A difference is the derivative of what is computed forward; where "
    "the backward is meant to be another one (a straight-through estimator, a reversed gradient), "
    "choose the route Reverse()"
)


class DifferenceStep(Protocol):
    """The step size of a central difference; see the route ``CentralDifference``."""

    @property
    def relative_step(self) -> float | None:
        """The relative step ``ε ‖d‖ / ‖θ‖``, or None."""

    @property
    def radius(self) -> float | None:
        """The absolute step ``ε ‖d‖``, or None."""

    @property
    def widen(self) -> bool:
        """The choice whether 16-bit numbers are shifted and passed to the function in float32."""


def central_difference(
    route: DifferenceStep,
    function: Callable[[Params, Any, StopGradients], tuple[Tensor, ...]],
    params: Params,
    direction: Tree,
    inputs: Any,
    like: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Return ``(f(θ + ε d) − f(θ − ε d)) / 2ε``, the derivative of f along d up to O(ε²).

    Unless the route sets a step, ``ε ‖d‖ = η^(1/3) ‖θ‖ / 10``, where η is the machine epsilon of
    the least precise number involved, those within the loss included (a float32 norm in a float64
    model), and the norms are over the parameters with a direction. The power balances the
    truncation error C ε² against the rounding error O(η / ε), and the tenth accounts for C: on the
    multilayer perceptron, transformer and convolution of the tests the error is smallest between
    0.1 and 0.2 of η^(1/3), in bfloat16, float16 and float32.

    What autograd treats as a constant (``bilevel.autodiff.stop_gradients``) keeps the value that
    it has at θ, so that f is the function which autograd differentiates.

    Cost: two evaluations of the function; three if it computes in less precision than its
    parameters have; three more if constants depend on θ.

    Args:
        route: The step size, and whether 16-bit numbers are widened.
        function: The function f from (θ, inputs, watch) to tensors. It runs the loss, and nothing
            else, under ``watch``, at leaves that require grad.
        params: The parameters θ.
        direction: The direction d, like θ. None leaves are zero.
        inputs: Any pytree that the function needs in the precision of θ (a batch, φ).
        like: Tensors of the shapes and dtypes of the function's values.

    Returns:
        The derivatives, like the values, or wider if these were widened. For d = 0 they are zeros,
        for a non-finite d NaNs; in both cases the function is not called.

    Raises:
        RuntimeError: The function cannot be evaluated on the widened copies, or its constants
            cannot be held.

    Warns:
        UserWarning: Part of the function cannot be watched, so that its constants, and the
            derivatives that a custom ``autograd.Function`` gives itself, are not seen.
    """
    rebuild, primals, tangents = moving(params, direction)
    length = float(tree.norm(tangents))
    if length == 0.0:
        return tuple(torch.zeros_like(value) for value in like)
    if not math.isfinite(length):
        return tuple(torch.full_like(value, math.nan) for value in like)
    widen = route.widen and any(leaf.dtype in HALF for leaf in primals)
    if widen:
        inputs = tree.map(_widened, inputs)
        rebuild = _then_widened(rebuild)
    kinds = {leaf.device.type for leaf in primals}
    known = {leaf.dtype for leaf in (*primals, *like)}

    def call(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call an operation without autocast, even where the loss itself enables it."""
        if not _autocasting(kinds):
            return func(*args, **kwargs)
        with _without_autocast(kinds):
            return func(*args, **kwargs)

    def watching(held: Sequence[Constant] | None = None) -> StopGradients:
        return StopGradients(held, call if route.widen else None)

    def at(distance: float, watch: StopGradients) -> tuple[Tensor, ...]:
        shifted = []
        for primal, tangent in zip(primals, tangents, strict=True):
            wide = torch.promote_types(primal.dtype, torch.float32)
            moved = torch.add(primal.to(wide), tangent.to(wide), alpha=distance)
            shifted.append(moved if widen else moved.to(primal.dtype))
        with _without_autocast(kinds) if route.widen else nullcontext(), _advice(route.widen):
            values = function(rebuild(shifted), inputs, watch)
        watch.finish()
        return values

    step, watch = _step(route, primals, known, length), watching()
    ahead = at(step, watch)
    known |= watch.dtypes
    if step != (longer := _step(route, primals, known, length)):
        step, watch = longer, watching()
        ahead = at(step, watch)
    other = watching()
    behind = at(-step, other)
    if not equal(watch.constants, other.constants):
        here = watching()
        at(0.0, here)
        ahead, behind = (at(sign * step, watching(here.constants)) for sign in (1.0, -1.0))
    if watch.opaque:
        warnings.warn(_OPAQUE, stacklevel=2)
    return tuple((a - b) / (2.0 * step) for a, b in zip(ahead, behind, strict=True))


def moving(
    params: Params, direction: Tree
) -> tuple[Callable[[Sequence[Tensor]], Params], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return a function that rebuilds all parameters, those with a direction, and directions."""
    leaves, structure = optree.tree_flatten(params, none_is_leaf=True)
    directions = structure.flatten_up_to(direction)
    indices = [index for index, along in enumerate(directions) if along is not None]

    def rebuild(values: Sequence[Tensor]) -> Params:
        filled = [leaf if leaf is None else leaf.detach() for leaf in leaves]
        for index, value in zip(indices, values, strict=True):
            filled[index] = value
        shifted: Params = structure.unflatten(filled)
        return shifted

    return (
        rebuild,
        tuple(leaves[index].detach() for index in indices),
        tuple(directions[index] for index in indices),
    )


def _step(
    route: DifferenceStep, primals: Sequence[Tensor], dtypes: set[torch.dtype], length: float
) -> float:
    """Return the step ε for numbers of these precisions."""
    if route.radius is not None:
        return route.radius / length
    relative = route.relative_step
    if relative is None:
        if route.widen:
            dtypes = {torch.promote_types(dtype, torch.float32) for dtype in dtypes}
        else:
            kinds = {leaf.device.type for leaf in primals}
            dtypes = dtypes | {torch.get_autocast_dtype(kind) for kind in _autocasting(kinds)}
        relative = 0.1 * max(torch.finfo(dtype).eps for dtype in dtypes) ** (1 / 3)
    reach = float(tree.norm(primals))
    return relative * (reach if reach > 0.0 else 1.0) / length


@contextmanager
def _without_autocast(kinds: Iterable[str]) -> Iterator[None]:
    with ExitStack() as stack:
        for kind in _autocasting(kinds):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _autocasting(kinds: Iterable[str]) -> list[str]:
    return [kind for kind in kinds if torch.is_autocast_enabled(kind)]


@contextmanager
def _advice(widened: bool) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, TypeError) as error:
        if not widened or not any(part in str(error) for part in MISMATCH):
            raise
        raise RuntimeError(
            f"route CentralDifference(): the loss cannot take float32 copies of its parameters "
            f"without autocast ({error}); it mixes them with 16-bit tensors of its own (frozen "
            "weights, buffers): choose CentralDifference(widen=False), which shifts them in the "
            "precision of the loss and is less precise, or a route that does not shift them"
        ) from error


def _widened(leaf: Any) -> Any:
    return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in HALF else leaf


def _then_widened(
    rebuild: Callable[[Sequence[Tensor]], Params],
) -> Callable[[Sequence[Tensor]], Params]:
    return lambda values: tree.map(_widened, rebuild(values))
