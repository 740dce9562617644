"""What is handed to a solver by mistake, refused by a sentence that says what to hand over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bilevel import tree
from bilevel.checks import refuse_data_parallel
from bilevel.tree import Tree


def check_params(level: str, params: Tree) -> None:
    """Refuse parameters that are no tree of floating-point tensors.

    Args:
        level: "lower_params" or "upper_params".
        params: What was given.

    Raises:
        ValueError: A leaf is not floating point, or spread over processes.
        TypeError: A module, an iterator, or a leaf that is no tensor.
    """
    if isinstance(params, nn.Module):
        raise TypeError(
            f"{level}: expected tensors by name, found the module {type(params).__name__}; give "
            "f.params of f = bilevel.functional(module), and call f(params, ...) in the loss"
        )
    if isinstance(params, Iterator):
        raise TypeError(
            f"{level}: expected tensors by name, found a {type(params).__name__}; give f.params of "
            "f = bilevel.functional(module), or dict(module.named_parameters())"
        )
    for name, leaf in tree.flatten(params).items():
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{level}: {name!r} is a {type(leaf).__name__}; expected a tensor, such as "
                f"torch.tensor({leaf!r})"
                if isinstance(leaf, int | float)
                else f"{level}: {name!r} is a {type(leaf).__name__}; expected a tensor"
            )
        if not leaf.is_floating_point():
            raise ValueError(
                f"{level}: {name!r} is {leaf.dtype}; expected floating point. Buffers and "
                "frozen tensors do not belong here: let the loss hold them"
            )
        refuse_data_parallel(leaf)


def check_optimizer(field: str, optimizer: object) -> None:
    """Refuse an optimizer that is not a pure one.

    Raises:
        TypeError: An optimizer of ``torch.optim``, a class, or anything without ``init`` and
            ``update``.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        name = type(optimizer).__name__
        raise TypeError(
            f"BilevelSolver: {field} is torch.optim.{name}, which changes parameters in place and "
            "holds them; give an optimizer of bilevel, such as bilevel.Adam(learning_rate)"
        )
    if isinstance(optimizer, type):
        raise TypeError(
            f"BilevelSolver: {field} is the class {optimizer.__name__}; give an optimizer, such as "
            f"{optimizer.__name__}(learning_rate)"
        )
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"BilevelSolver: {field} must have init and update, as bilevel.SGD(learning_rate) has; "
            f"found {optimizer!r}"
        )


def check_method(hypergradient: object) -> None:
    """Refuse what is no hypergradient.

    Raises:
        TypeError: A class, a route, or anything without ``record``.
    """
    if isinstance(hypergradient, type):
        name = hypergradient.__name__
        raise TypeError(f"BilevelSolver: hypergradient is the class {name}; give {name}(...)")
    if hasattr(hypergradient, "backward_pass"):
        raise TypeError(
            f"BilevelSolver: hypergradient is the route {hypergradient!r}; give "
            f"OneStep({hypergradient!r})"
        )
    if not hasattr(hypergradient, "record"):
        raise TypeError(
            "BilevelSolver: hypergradient must be OneStep(...), Unrolled(...), Implicit(...), "
            f"Penalty(...) or an object with their methods; found {hypergradient!r}"
        )


def drawn_steps(batches: Any, steps: int, accumulation: int) -> Any:
    """Return the micro-batches of steps, drawn where an iterator stands for them.

    Args:
        batches: For each step its micro-batches, or an iterator over these; or an iterator over
            the micro-batches of all steps, ``iter(loader)`` say. Anything else as it is.
        steps: How many are drawn of the latter.
        accumulation: How many micro-batches a step has.

    Raises:
        TypeError: A batch itself, or a loader without its iterator.
        ValueError: The iterator ends before the last micro-batch.
    """
    if isinstance(batches, Iterator):
        found = _drawn("batches", batches, steps * accumulation)
        return [found[at : at + accumulation] for at in range(0, len(found), accumulation)]
    check_steps(batches)
    return [
        _drawn("lower_batches", one, accumulation) if isinstance(one, Iterator) else one
        for one in batches
    ]


def _drawn(name: str, batches: Iterator[Any], count: int) -> list[Any]:
    found = list(islice(batches, count))
    if len(found) < count:
        raise ValueError(
            f"{name}: expected an iterator with {count} more micro-batches, found {len(found)}; "
            "start a new one where it ends, as iter(loader) does"
        )
    return found


def check_source(name: str, batches: object) -> None:
    """Refuse what is no source of batches for a loop, above all a batch itself.

    Args:
        name: What it was given as.
        batches: What was given.

    Raises:
        TypeError: A tensor, whose rows would be taken for batches, a mapping, or the like.
    """
    one = isinstance(batches, Tensor | Mapping | str | bytes) or hasattr(batches, "_fields")
    if one or hasattr(batches, "__array__") or not hasattr(batches, "__iter__"):
        if isinstance(batches, Dataset):
            return  # an iterable of rows, which the loss may take as they are
        raise TypeError(
            f"fit: {name}: expected a DataLoader, a list of batches or an iterator over batches, "
            f"found a {type(batches).__name__}; if it is one batch, give [{name}]"
        )


def check_micro_batches(name: str, batches: Any, accumulation: int) -> None:
    """Refuse anything but the list of the micro-batches of a step.

    Args:
        name: What it was given as.
        batches: What was given.
        accumulation: How many micro-batches a step has.

    Raises:
        TypeError: A batch itself.
        ValueError: Another number of micro-batches.
    """
    _check_list(name, batches, "micro-batches")
    if len(batches) != accumulation:
        hint = ""
        if isinstance(batches, tuple) or any(isinstance(part, Tensor) for part in batches):
            hint = f"; if this is one batch, give [{name}]"
        raise ValueError(
            f"{name}: expected accumulation={accumulation} micro-batches, found "
            f"{len(batches)}{hint}"
        )


def check_steps(batches: Any) -> None:
    """Refuse anything but a list with, for each lower step, the list of its micro-batches.

    Raises:
        TypeError: A batch itself, or a loader.
    """
    _check_list("batches", batches, "lower steps, each a list of micro-batches")


def _check_list(name: str, value: Any, of: str) -> None:
    kind = type(value).__name__
    if isinstance(value, DataLoader):
        raise TypeError(
            f"{name}: expected a list of {of}, found a {kind}, which would start anew with each "
            "call; give iter(loader), made once"
        )
    if _is_batch(value):
        raise TypeError(
            f"{name}: expected a list of {of}, found a {kind}; if it is one batch, give [{name}]"
        )


def _is_batch(value: Any) -> bool:
    named = isinstance(value, tuple) and hasattr(value, "_fields")
    sequence = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return named or is_dataclass(value) or isinstance(value, Mapping) or not sequence
