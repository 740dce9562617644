"""Results that autograd treats as constants although they depend on the parameters.

Those of ``.detach()``, of ``Tensor.data``, of ``.item()``, and of everything that is computed while
grad mode is off: teachers, pseudo-labels, moving averages, straight-through estimators. A gradient
leaves them out, so a derivative of the gradient must do so, too. Two ways to compute one do not by
themselves: forward mode, which knows nothing of grad mode, and differences, which evaluate the loss
elsewhere. Here they are taught to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bilevel import tree
from bilevel.autodiff import equivalents
from bilevel.autodiff.torch_private import (
    SET_GRAD_MODE,
    forward_gradients_are_on,
    moves_forward,
    set_forward_gradients,
    transform_is_active,
)
from bilevel.problem import Problem, ReweightingProblem, detached

ProblemT = TypeVar("ProblemT", bound=Problem)

Call: TypeAlias = Callable[[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], Any]

# A tensor of its own, or a number that left torch by ``.item()`` or ``.tolist()``.
Constant: TypeAlias = Tensor | float | list[Any]

# Each access makes another object of these, equal to the last.
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_WRITING_DATA = frozenset([Tensor.data.__set__])  # type: ignore[attr-defined]
_DETACHING = frozenset([Tensor.detach_, torch.detach_])
_WRITING = _WRITING_DATA | _DETACHING
_LEAVING = (Tensor.item, Tensor.tolist, Tensor.__float__, Tensor.__complex__)
_STOPS = frozenset([Tensor.detach, torch.detach, _DATA, *_LEAVING]) | _DETACHING
_KINDS = (Tensor, tuple, list, float, complex)  # of results that can hold constants


def call_without_tangents(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Call a torch function so that forward mode sees the constants that autograd sees.

    For the ``__torch_function__`` of a mode around a loss that is run with grad mode on. While the
    loss switches grad mode off, tangents are off as well: operations in place keep that of the
    tensor that they write to, as they keep its graph. A view could find the tangent of its base
    again when they are back on, so what such operations return is detached.
    """
    if func is SET_GRAD_MODE:
        if _switches(*args):
            set_forward_gradients(*args)
        return func(*args, **kwargs)
    if func == _REQUIRES_GRAD:  # So that a loss which asks goes the way that it went before.
        return func(*args, **kwargs) or moves_forward(args[0])
    if func is Tensor.register_hook:
        raise NotImplementedError("forward-mode derivatives do not see Tensor.register_hook")
    if func == _DATA:  # In forward over reverse ``.data`` loses one of the two derivatives.
        return args[0].detach()
    if func in _DETACHING:  # Likewise; zeros have no tangent, nor what is put.
        constant = args[0].detach().clone()
        return func(*args, **kwargs).zero_().copy_(constant)
    result = func(*args, **kwargs)
    if torch.is_grad_enabled():
        return result
    given = list(_tensors((args, kwargs)))
    return _each(result, lambda one: one if any(one is other for other in given) else one.detach())


class StopGradients(TorchFunctionMode):
    """Watches a loss, and collects the constants that depend on the parameters.

    Masks, indices and classes (``z > 0``, ``z.argmax()``) are among them.

    The loss must be run with autograd on, at parameters that require grad: a constant is then a
    result that does not require grad, of an operation on something that does. What follows from
    constants alone is not looked at. Where the loss is run again elsewhere, constants of the first
    run take the places of its own, so that the difference of both is that of the function which
    autograd differentiates.

    Args:
        held: Constants of another run, in their order; None: those of this run stay.
        call: How operations are called; None: as they are.

    Attributes:
        constants: Those of this run, before any was replaced, copied.
        dtypes: The precisions of all results that require grad.
        opaque: Whether part of the loss cannot be watched: a custom ``autograd.Function``, whose
            backward may be anything, or constants within a transform of ``torch.func``.
    """

    def __init__(self, held: Sequence[Constant] | None = None, call: Call | None = None) -> None:
        super().__init__()
        self.constants: list[Constant] = []
        self.dtypes: set[torch.dtype] = set()
        self.opaque = False
        self._held, self._call = held, call
        self._on = True
        self._aliases: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        off = not torch.is_grad_enabled()
        # Around the forward of an autograd.Function torch switches off tangents, too.
        dark = off and not forward_gradients_are_on() and not torch.is_inference_mode_enabled()
        inside = dark and self._on
        self.opaque |= inside
        if func is SET_GRAD_MODE and not inside and _switches(*args):
            (self._on,) = args
        if transform_is_active():
            self.opaque |= off or func in _STOPS
            inside = True
        if func is Tensor.register_hook:
            self.opaque = True
        written_out = None if inside else _written_out(func, kwargs)
        if written_out is not None:
            with self:  # within torch's own function no mode would see what is held
                return written_out(*args, **kwargs)
        versions = []
        if not inside and (off or func in _WRITING):
            versions = [(one, one._version) for one in _tensors((args, kwargs)) if _has_graph(one)]
        call = self._call
        result = func(*args, **kwargs) if call is None else call(func, args, kwargs)
        if isinstance(result, Tensor) and result.requires_grad and not off:
            self.dtypes.add(result.dtype)
            return result
        if inside or not (result is None or isinstance(result, _KINDS)):
            return result
        given = list(_tensors((args, kwargs)))
        moving = [one for one, _ in versions] or [one for one in given if _has_graph(one)]
        if not moving:
            return result
        if func in _WRITING_DATA or (off and any(one._version != old for one, old in versions)):
            raise RuntimeError(_IN_PLACE)
        if result is None:  # ``x[0] = y``: what was written to
            _each(args[0], lambda one: self._held_or_own(one, moving, given))
            return None
        if isinstance(result, list | float | complex) and not list(_tensors(result)):
            return self._next(result)
        return _each(result, lambda one: self._held_or_own(one, moving, given))

    def _held_or_own(
        self, one: Tensor, moving: Sequence[Tensor], given: Sequence[Tensor]
    ) -> Tensor:
        """Return a tensor as it is, or, if it is a constant, the one held in its place."""
        if _has_graph(one):
            return one
        own = one.detach().clone()
        written = any(one is other for other in given)
        if not written and any(_share(one, other) for other in moving):
            self._aliases.append((one, own))
        held: Tensor = self._next(own)
        if held is own:
            return one
        if not written:
            return held.clone()
        with torch.no_grad():
            return one.copy_(held)  # a buffer, ``out=``

    def _next(self, own: Any) -> Any:
        self.constants.append(own)
        if self._held is None:
            return own
        held = next(iter(self._held[len(self.constants) - 1 :]), None)
        if getattr(held, "shape", type(held)) != getattr(own, "shape", type(own)):
            raise RuntimeError(_ANOTHER_PATH)
        return held

    def finish(self) -> None:
        """Raise RuntimeError if a tensor was written to through an alias without a graph."""
        if not all(torch.equal(one, own) for one, own in self._aliases):
            raise RuntimeError(_IN_PLACE)


_IN_PLACE = (
    "the loss writes into a tensor that depends on its parameters where autograd does not see it "
    "(`.data`, `.detach()`, or grad mode off); a difference of such losses is not the derivative "
    "that autograd computes: write a new tensor instead, or choose the route Reverse()"
)

_ANOTHER_PATH = (
    "the loss computes other constants (`.detach()`, grad mode off) at neighbouring parameters: a "
    "difference across such a branch is no derivative; choose the route Reverse()"
)


def watched(problem: ProblemT, watch: TorchFunctionMode) -> ProblemT:
    """Return the problem with its functions run under a mode, and nothing else."""

    def under(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with watch:
                return function(*args)

        return run

    upper_loss = under(problem.upper_loss)
    if not isinstance(problem, ReweightingProblem):
        return replace(problem, lower_loss=under(problem.lower_loss), upper_loss=upper_loss)

    def per_example_loss(*args: Any) -> tuple[Tensor, Any]:
        losses, features = problem.per_example_loss(*args)
        return losses, detached(features) if problem.detach_features else features

    return replace(
        problem,
        per_example_loss=under(per_example_loss),
        weights=under(problem.weights),
        upper_loss=upper_loss,
    )


def equal(left: Sequence[Constant], right: Sequence[Constant]) -> bool:
    """Return whether two runs had the same constants bit for bit."""
    return len(left) == len(right) and all(map(_same, left, right))


def _same(left: Constant, right: Constant) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape and torch.equal(left, right)
    return type(left) is type(right) and left == right


def _written_out(
    func: Callable[..., Any], kwargs: Mapping[str, Any]
) -> Callable[..., Tensor] | None:
    """Return what stands for a function of torch that stops gradients within itself."""
    if func is functional.gumbel_softmax and kwargs.get("hard"):
        return equivalents.gumbel_softmax
    if func is not functional.embedding:
        return None
    if kwargs.get("max_norm") is not None:
        raise RuntimeError(_IN_PLACE)
    special = kwargs.get("padding_idx") is not None or kwargs.get("scale_grad_by_freq")
    return equivalents.embedding if special else None


def _switches(on: bool) -> bool:
    """Return whether a call that sets grad mode changes it.

    torch itself has it off while a tensor is packed for the backward pass, and a hook that packs
    (nested checkpointing) may set it off again, and to off when it is done; torch then switches it
    on where no mode sees it.
    """
    return on != torch.is_grad_enabled()


def _has_graph(one: Tensor) -> bool:
    """Return whether gradients pass; a view made with grad mode off only says so."""
    return one.requires_grad and (one.grad_fn is not None or not one._is_view())


def _share(left: Tensor, right: Tensor) -> bool:
    alike = left.layout == right.layout == torch.strided and left.numel() > 0
    return alike and left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in the arguments or results of a torch function."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)


def _each(result: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``change`` to the tensors of a result; other leaves stay."""
    if isinstance(result, Tensor):
        return change(result)
    if isinstance(result, tuple | list) and any(True for _ in _tensors(result)):
        return tree.map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, result)
    return result
