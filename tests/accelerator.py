"""A pretend accelerator, which finds faults of device placement without a device.

Its tensors compute on the CPU and say that they are on the device. While ``Accelerator`` is active
it notes, with the line of the project that is the cause:

* every **mix-up**: an operation on tensors of the accelerator and of the CPU, which a real device
  refuses. (Numbers that are CPU tensors without dimensions are allowed, as there.)
* every **wait**: an operation for which the host waits for the device: a value that is read, a copy
  to the CPU, a result whose shape depends on values.
* every **transfer** from the CPU to the accelerator.

The values are those of the CPU, bit for bit.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "pretended"
ROOT = Path(__file__).parents[1]
PACKAGES = tuple(f"{ROOT / name}/" for name in ("bilevel", "prm", "recipes", "weighting"))

WAITS = frozenset(
    {
        "_local_scalar_dense",
        "_unique2",
        "allclose",
        "bincount",
        "equal",
        "masked_select",
        "nonzero",
        "unique_consecutive",
        "unique_dim",
    }
)
"""Operations for which the host waits, whatever their arguments."""

MOVES = frozenset({"_to_copy", "copy_", "_copy_from", "set_"})
"""Operations that may take tensors of two devices."""


MODES = ("__torch_function__", "_call")
"""Functions that pass an operation of a loss on, which is the cause."""


class Pretended(Tensor):
    """A tensor that says that it is on the device."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Pretended:
        return Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=device(),
        )

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __repr__(self) -> str:
        return f"Pretended({self.values})"

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.values.untyped_storage()

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl


@dataclass(frozen=True)
class Event:
    """What was noted: its kind, the operation, and the place in the project."""

    kind: Literal["mix-up", "wait", "transfer"]
    operation: str
    place: str
    line: int


class Accelerator(TorchDispatchMode):
    """Computes operations on the pretend device, and notes events."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [*tensors_of(args), *tensors_of(kwargs.values())]
        self._note(func, args, kwargs, tensors)
        return _computed(func, args, kwargs, tensors)

    def of(self, kind: str) -> Counter[str]:
        """Return how often each place caused an event of a kind."""
        return Counter(event.place for event in self.events if event.kind == kind)

    def _note(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> None:
        name = func.overloadpacket.__name__
        there = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
        here = [t for t in tensors if not isinstance(t, Pretended) and t.dim() > 0]
        if name in MOVES:
            to = kwargs.get("device")
            into = args[0] if name == "copy_" else None
            if into is not None:
                to = into.device
                there = [tensor for tensor in there if tensor is not into]
            if to is not None and (torch.device(to).type == "cpu") == bool(there):
                if not there and not tensors:
                    return
                self._add("wait" if there else "transfer", name)
        elif there and here:
            self._add("mix-up", name)
        elif there and (
            name in WAITS or _indexes_by_mask(name, args) or _counts_repeats(func, args, kwargs)
        ):
            self._add("wait", name)

    def _add(self, kind: Literal["mix-up", "wait", "transfer"], operation: str) -> None:
        place, line = _cause(sys._getframe(1))
        self.events.append(Event(kind, operation, place, line))


def computed(func: Any, args: Any, kwargs: Any) -> Any:
    """Return the result of an operation, computed on the CPU, on the device where it belongs."""
    return _computed(func, args, kwargs, [*tensors_of(args), *tensors_of(kwargs.values())])


def _computed(func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Any:
    device = kwargs.get("device")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        pretended = torch.device(device).type == NAME
    elif func.overloadpacket.__name__ == "copy_":
        pretended = isinstance(args[0], Pretended)
    else:
        pretended = any(isinstance(tensor, Pretended) for tensor in tensors)
    plain = {name: _mapped(_values, value) for name, value in kwargs.items()}
    result = func(*_mapped(_values, args), **plain)
    if not pretended:
        return result
    given = {id(tensor.values): tensor for tensor in tensors if isinstance(tensor, Pretended)}

    def wrapped(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return given[id(leaf)] if id(leaf) in given else Pretended(leaf)

    return _mapped(wrapped, result)


def tensors_of(values: Any) -> Iterator[Tensor]:
    """The tensors among what an operation takes, which it nests in lists and tuples alone.

    There are hundreds of thousands of operations, and torch's pytrees take longer than they do.
    """
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_of(value)


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """What an operation takes or returns, with every leaf mapped."""
    if isinstance(value, list):
        return [_mapped(function, one) for one in value]
    if isinstance(value, tuple):
        return tuple([_mapped(function, one) for one in value])
    return function(value)


def _values(leaf: Any) -> Any:
    return leaf.values if isinstance(leaf, Pretended) else leaf


def _indexes_by_mask(name: str, args: Any) -> bool:
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return False
    return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])


def _counts_repeats(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether the length of the result is the sum of values of a tensor."""
    if func is not torch.ops.aten.repeat_interleave.Tensor:
        return False
    return (args[1] if len(args) > 1 else kwargs.get("output_size")) is None


def _cause(frame: FrameType | None) -> tuple[str, int]:
    """Return the innermost function of the project on the stack; of libraries their own, too."""
    outside = ""
    while frame is not None:
        own, others = _names(frame.f_code)
        if own:
            return own + outside, frame.f_lineno
        outside = outside or others
        frame = frame.f_back
    return f"?{outside}", 0


@cache
def _names(code: CodeType) -> tuple[str, str]:
    """The name of a function if it is of the project, and if it is of transformers."""
    file = code.co_filename
    if file.startswith(PACKAGES) and code.co_name not in MODES:
        return f"{Path(file).relative_to(ROOT)}:{code.co_name}", ""
    if "/transformers/" in file:
        return "", f" <- {Path(file).stem}.{code.co_name}"
    return "", ""


class _Backend(_DummyBackendModule):
    """What torch asks a device for: its generator among others, which nothing here draws from."""

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class _Generator(torch.Generator):
    """A generator of the CPU, whatever device it is asked for."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu")


def register() -> None:
    """Tell torch of the device, once in a process, which keeps it until it ends."""
    _setup_privateuseone_for_python_backend(NAME, _Backend())
    torch.Generator = _Generator
    library = torch.library.Library("aten", "IMPL")
    for name in ("empty.memory_format", "empty_strided", "copy_", "zero_", "fill_.Scalar"):
        operation, _, overload = name.partition(".")
        function = getattr(getattr(torch.ops.aten, operation), overload or "default")
        library.impl(name, _kernel(function), "PrivateUse1")
    _LIBRARIES.append(library)


def _kernel(function: Any) -> Any:
    """Return a kernel for what torch calls from C++, out of sight of a dispatch mode."""
    return lambda *args, **kwargs: computed(function, args, kwargs)


_LIBRARIES: list[torch.library.Library] = []


def device() -> torch.device:
    """Return the device of the accelerator, which ``register`` has made known."""
    return torch.device(NAME, 0)
