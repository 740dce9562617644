"""Limits within which the files of a model are read: their authors may be careless or hostile.

Whatever other libraries raise on such files becomes one sentence, and the sizes that a
configuration states are compared with the weights that are there before memory is allocated.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration

_LONGEST = 300  # characters of another library's message
_COUNT = re.compile(r"(layers?|depths?|blocks?|stages|experts|heads)$")
_MOST_LAYERS = 10_000
_MODULES_PER_TENSOR = 20  # of every architecture in transformers, activations and dropouts included
_SMALL = 10_000  # modules that are built in less than a second
_SMALL_VALUES = 2**24


class ModelError(ValueError):
    """A model folder that cannot be used; the message says which file, why, and what to do."""


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn what other libraries raise within this context into a ``ModelError`` about ``what``.

    Raises:
        ModelError: The body failed. One of its own is left as it is.
    """
    try:
        yield
    except ModelError:
        raise
    except BaseException as error:
        # Panics of the tokenizers library, which is written in Rust, are no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{what} cannot be used: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"it needs the package {error.name}, which is not installed; install it"
    if isinstance(error, KeyError) and error.args:
        return f"the entry {error.args[0]!r} is missing"
    text = " ".join(str(error).split())
    if not isinstance(error, ValueError | OSError | ImportError) or not text:
        text = f"{type(error).__name__}: {text}"  # the text alone says nothing
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        FileNotFoundError: There is no such file.
        ModelError: The file holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected {path}, found nothing there")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: expected JSON, found {_reason(error)}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def check_counts(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse numbers of layers, heads and experts that no model has.

    Raises:
        ModelError: A number at any depth of ``config`` exceeds the limit; ``path`` is its file.
    """
    stack: list[tuple[str, Any]] = [("", config)]
    while stack:
        name, value = stack.pop()
        if isinstance(value, Mapping):
            stack.extend((f"{name}.{key}" if name else str(key), v) for key, v in value.items())
        elif isinstance(value, list):
            stack.extend((name, entry) for entry in value)
        elif _COUNT.search(name) and isinstance(value, int | float) and value > _MOST_LAYERS:
            raise ModelError(
                f"{path}: {name}: expected at most {_MOST_LAYERS}, found {value}; "
                "use the configuration that belongs to the weights"
            )


@contextmanager
def no_larger_than(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], where: str
) -> Iterator[None]:
    """Within this context, refuse to build a model much larger than the tensors of ``shapes``.

    transformers builds a model without memory for its weights, but the number of its modules takes
    time, and tensors that the files lack would be allocated. Moderate differences are left to the
    comparison of names and shapes.

    Args:
        shapes: Shape of every tensor in the weight files.
        config: The content of ``config.json``. Quantised weights may hold 16 values in one number.
        where: The name of the model, for the message.

    Raises:
        ModelError: The modules, or the values of the parameters and buffers, are too many.
    """
    stored = sum(math.prod(shape) for shape in shapes.values())
    most_modules = _SMALL + _MODULES_PER_TENSOR * len(shapes)
    most_values = _SMALL_VALUES + stored * (16 if "quantization_config" in config else 2)
    modules: set[tuple[int, str]] = set()
    values: dict[tuple[int, str], int] = {}
    total = 0

    def refuse(what: str) -> None:
        raise ModelError(
            f"{where}: config.json describes a model of more than {what}, but the weights are "
            f"{len(shapes)} tensors of {stored} values; use the configuration that belongs to them"
        )

    def count_module(owner: nn.Module, name: str, module: nn.Module) -> None:
        modules.add((id(owner), name))
        if len(modules) > most_modules:
            refuse(f"{most_modules} modules")

    def count_values(owner: nn.Module, name: str, value: Tensor | None) -> None:
        nonlocal total
        if value is not None:
            total += value.numel() - values.get((id(owner), name), 0)
            values[id(owner), name] = value.numel()
        if total > most_values:
            refuse(f"{most_values} values")

    with ExitStack() as stack:
        for handle in (
            registration.register_module_module_registration_hook(count_module),
            registration.register_module_parameter_registration_hook(count_values),
            registration.register_module_buffer_registration_hook(count_values),
        ):
            stack.callback(handle.remove)
        yield


def is_finite(value: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor an infinite value; one pass, no copy."""
    if not value.is_floating_point() or not value.numel():
        return True
    if value.element_size() == 1:
        value = value.float()  # torch orders no 8-bit floats
    least, most = torch.aminmax(value.detach())  # NaN is passed on
    return bool(torch.isfinite(least) & torch.isfinite(most))


def listed(names: list[str], most: int = 5) -> str:
    """Return names for a message, shortened when they are many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more
