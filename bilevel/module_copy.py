"""Light copies of a module tree that hold other tensors.

``torch.func.functional_call`` puts tensors into the user's module and takes them out when the call
ends, so whatever runs a part of the module later, such as activation checkpointing in the backward
pass, sees the module's own values. Here the module is left alone: each call runs on new module
objects, which hold the call's tensors for as long as anything refers to them.

A copy shares with its module everything but the tensors, and whatever leads to them past the
registered submodules: lists and dicts of modules, the flat weights of an RNN, bound methods,
partial functions, closures, weak references, and objects with such attributes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
import types
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_REGISTERED = ("_parameters", "_buffers", "_modules")
# A call that torch has compiled for the module itself.
_COMPILED = "_compiled_call_impl"
_ATOMS = (
    *(str, bytes, int, float, complex, bool, type(None), type(Ellipsis), type, types.ModuleType),
    *(types.BuiltinFunctionType, types.CodeType, torch.dtype, torch.device, torch.Generator),
    *(torch.Size, torch.layout, torch.memory_format, range, slice),
)


@dataclass
class _Plan:
    """One module: its attributes when they were last looked at, and those that are other ones."""

    module: nn.Module
    values: list[Any]
    rebuilt: tuple[str, ...]
    replaced: Mapping[str, Any] = field(default_factory=dict)  # by name, what takes its place


class ModuleCopier:
    """Makes copies of one module tree. What has to be rebuilt is found once, and when it changes.

    Args:
        module: The root.

    Raises:
        TypeError: A module cannot be copied, or an attribute leads to a module or parameter through
            an object that cannot be.
    """

    def __init__(self, module: nn.Module) -> None:
        self._root = module
        self._plans = [_Plan(one, [], ()) for one in module.modules()]
        self._modules = {id(plan.module) for plan in self._plans}
        self._parameters: dict[int, Tensor] = {}
        self._buffers: dict[int, Tensor] = {}
        for plan in self._plans:
            for kind, found in (
                (plan.module._parameters, self._parameters),
                (plan.module._buffers, self._buffers),
            ):
                found.update({id(one): one for one in kind.values() if one is not None})
        clean: set[int] = set()
        for plan in self._plans:
            self._look(plan, clean)
        self.bound({})  # an attribute that cannot be rebuilt is found here, not in training

    def bound(self, tensors: Mapping[int, Tensor]) -> BoundCopy:
        """Return a copy of the tree.

        Args:
            tensors: By the identity of a parameter, what takes its place; others stay. Buffers are
                cloned.

        Raises:
            ValueError: The module has other submodules or parameters than when it was planned.
        """
        memo: dict[int, Any] = dict(tensors)
        states: list[dict[str, Any]] = []
        copies: list[nn.Module] = []
        for plan in self._plans:
            copied = object.__new__(type(plan.module))
            memo[id(plan.module)] = copied
            copies.append(copied)
        for plan, copied in zip(self._plans, copies, strict=True):
            attributes = plan.module.__dict__
            values = plan.values
            if len(attributes) != len(values) or not all(
                map(operator.is_, attributes.values(), values)
            ):
                self._look(plan, set())
            state = dict(attributes)
            try:
                state["_modules"] = {
                    name: None if child is None else memo[id(child)]
                    for name, child in attributes["_modules"].items()
                }
            except KeyError:
                raise _changed(plan.module) from None
            state["_parameters"] = {
                name: parameter if parameter is None else self._parameter(plan, parameter, memo)
                for name, parameter in attributes["_parameters"].items()
            }
            if attributes["_buffers"]:
                state["_buffers"] = {
                    name: _cloned(buffer, memo) for name, buffer in attributes["_buffers"].items()
                }
            if attributes.get(_COMPILED) is not None:
                state[_COMPILED] = None
            state.update(plan.replaced)
            object.__setattr__(copied, "__dict__", state)
            states.append(state)
        for plan, state in zip(self._plans, states, strict=True):
            for name in plan.rebuilt:
                state[name] = self._rebuilt(state[name], memo, (plan.module, name))
        return BoundCopy(
            copies[0],
            [
                (plan.module, state, list(state.values()))
                for plan, state in zip(self._plans, states, strict=True)
            ],
        )

    def _parameter(self, plan: _Plan, parameter: Tensor, memo: Mapping[int, Any]) -> Tensor:
        given: Tensor | None = memo.get(id(parameter))
        if given is not None:
            return given
        if id(parameter) not in self._parameters:
            raise _changed(plan.module)
        return parameter

    def _look(self, plan: _Plan, clean: set[int]) -> None:
        """Find which attributes of a module have to be rebuilt."""
        attributes = plan.module.__dict__
        plan.values = list(attributes.values())
        skipped = (*_REGISTERED, _COMPILED)
        plan.rebuilt = tuple(
            name
            for name, value in attributes.items()
            if name not in skipped and self._leads(value, clean)
        )
        plan.replaced = {
            name: functools.partial(value, use_reentrant=False)
            for name, value in attributes.items()
            if _is_reentrant(value)
        }

    def _leads(self, root: Any, clean: set[int]) -> bool:
        """Return whether an object leads to a module, parameter or buffer of the tree.

        Args:
            root: The object.
            clean: Identities of objects that are known not to, to which those found are added.
        """
        seen: dict[int, Any] = {}
        pending = [root]
        while pending:
            value = pending.pop()
            key = id(value)
            if isinstance(value, _ATOMS) or key in seen or key in clean:
                continue
            if key in self._modules or key in self._parameters or key in self._buffers:
                return True
            if isinstance(value, Tensor):
                continue
            seen[key] = value  # alive until the end, so that no identity is used twice
            pending.extend(_parts(value))
        clean.update(seen)
        return False

    def _rebuilt(self, value: Any, memo: dict[int, Any], where: tuple[nn.Module, str]) -> Any:
        """Return the value, new as far as it leads to the tree."""
        if isinstance(value, _ATOMS):
            return value
        if id(value) in memo:
            return memo[id(value)]
        if isinstance(value, Tensor) or not self._leads(value, set()):
            return value
        try:
            return _rebuild(value, _Again(self, memo, where), memo)
        except _NotRebuilt as error:
            module, name = where
            raise TypeError(
                f"functional: attribute {name!r} of {type(module).__name__} leads to the module's "
                f"own parameters through a {error}, which cannot be copied, so the call would use "
                "these instead of the ones given; refer to them by a submodule, a list, a dict or "
                "a function"
            ) from None


@dataclass(frozen=True, eq=False)
class BoundCopy:
    """A copy of a module tree.

    Attributes:
        module: Its root.
        states: Per module the original, the copy's attributes, and their values before the call.
    """

    module: nn.Module
    states: Sequence[tuple[nn.Module, dict[str, Any], list[Any]]]

    def hand_back(self) -> None:
        """Set on the originals the attributes that a call has set on the copies.

        An auxiliary loss or a count is then found where it is after a call of the module itself.
        """
        for original, state, before in self.states:
            if len(state) == len(before) and all(map(operator.is_, state.values(), before)):
                continue
            old = dict(zip(state, before, strict=False))
            for name, value in state.items():
                if name not in _REGISTERED and (name not in old or old[name] is not value):
                    original.__dict__[name] = value


@dataclass(frozen=True, eq=False)
class _Again:
    """What rebuilds the parts of an object."""

    copier: ModuleCopier
    memo: dict[int, Any]
    where: tuple[nn.Module, str]

    def __call__(self, part: Any) -> Any:
        return self.copier._rebuilt(part, self.memo, self.where)

    def leads(self, part: Any) -> bool:
        return self.copier._leads(part, set())


class _NotRebuilt(Exception):
    """An object that leads to the tree and that cannot be rebuilt; its text names the type."""


def _is_reentrant(value: Any) -> bool:
    """Return whether an attribute checkpoints the reentrant way, as transformers sets it.

    That runs a part under ``no_grad``: where its input needs no gradient, as behind frozen
    embeddings, its parameters silently get none. The other way computes the same values.
    """
    return (
        isinstance(value, functools.partial)
        and value.func is checkpoint
        and value.keywords.get("use_reentrant", True) is not False
    )


def _changed(module: nn.Module) -> ValueError:
    return ValueError(
        f"functional: {type(module).__name__} has other submodules or parameters than when "
        "functional(module) was called; call it again"
    )


def _cloned(buffer: Tensor | None, memo: dict[int, Any]) -> Tensor | None:
    if buffer is None:
        return None
    clone: Tensor | None = memo.get(id(buffer))
    if clone is None:
        clone = memo[id(buffer)] = buffer.detach().clone()
    return clone


def _parts(value: Any) -> Iterable[Any]:
    """Return what an object refers to directly."""
    if isinstance(value, Mapping):
        return [*value.values(), *getattr(value, "__dict__", {}).values()]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return value
    if isinstance(value, functools.partial):
        return (value.func, value.args, value.keywords)
    if isinstance(value, types.MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, types.FunctionType):
        contents = [cell.cell_contents for cell in _filled(value.__closure__ or ())]
        return [*contents, value.__defaults__, value.__kwdefaults__, *vars(value).values()]
    if isinstance(value, weakref.ref):
        return (value(),)
    return list(getattr(value, "__dict__", {}).values())


def _rebuild(value: Any, again: _Again, memo: dict[int, Any]) -> Any:
    """Return a new object like ``value``, of parts that ``again`` gives."""
    new: Any
    if isinstance(value, tuple):
        parts = map(again, value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, frozenset):
        return frozenset(map(again, value))
    if isinstance(value, functools.partial):
        return functools.partial(again(value.func), *again(value.args), **again(value.keywords))
    if isinstance(value, types.MethodType):
        return types.MethodType(again(value.__func__), again(value.__self__))
    if isinstance(value, weakref.ref):
        referent = value()
        return value if referent is None else weakref.ref(again(referent))
    if isinstance(value, types.FunctionType):
        return _rebuild_function(value, again, memo)
    if isinstance(value, list | set | deque | dict):
        new = memo[id(value)] = copy.copy(value)
        if isinstance(value, dict):
            new.update({key: again(item) for key, item in value.items()})
        else:
            new.clear()
            (new.update if isinstance(value, set) else new.extend)(map(again, value))
        return new
    try:
        kind: Any = type(value)
        new = kind.__new__(kind)
        attributes = vars(new)
    except TypeError as error:
        raise _NotRebuilt(type(value).__name__) from error
    memo[id(value)] = new
    attributes.update({name: again(part) for name, part in vars(value).items()})
    return new


def _rebuild_function(
    function: types.FunctionType, again: _Again, memo: dict[int, Any]
) -> types.FunctionType:
    """Return the function over new cells, but where the contents stay: those may be assigned to."""
    cells = list(function.__closure__ or ())
    filled = _filled(cells)
    moved = {id(cell): types.CellType() for cell in filled if again.leads(cell.cell_contents)}
    closure = tuple(moved.get(id(cell), cell) for cell in cells)
    result = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, None, closure or None
    )
    memo[id(function)] = result  # before its parts, which may refer to it
    for cell in filled:
        if id(cell) in moved:
            moved[id(cell)].cell_contents = again(cell.cell_contents)
    result.__defaults__ = again(function.__defaults__)
    result.__kwdefaults__ = again(function.__kwdefaults__)
    result.__dict__.update({name: again(part) for name, part in vars(function).items()})
    return result


def _filled(cells: Iterable[types.CellType]) -> list[types.CellType]:
    """Return the cells that have contents."""
    filled = []
    for cell in cells:
        with contextlib.suppress(ValueError):
            cell.cell_contents  # noqa: B018
            filled.append(cell)
    return filled
