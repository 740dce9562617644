"""One way to refuse a hyperparameter: owner, field, value found, range allowed."""

from __future__ import annotations

import math

import torch


def require(
    owner: object,
    field: str,
    value: float,
    *,
    low: float = 0.0,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = True,
) -> None:
    """Raise ValueError unless ``value`` lies between ``low`` and ``high`` (NaN never does).

    TypeError if it is no number.

    Args:
        owner: The object whose field it is; its class name opens the message.
        field: Name of the field, as the user wrote it.
        value: The value found.
        low: Lower end of the allowed range.
        high: Upper end of the allowed range.
        low_open: Whether ``low`` itself is refused.
        high_open: Whether ``high`` itself is refused.
    """
    if not hasattr(value, "__float__"):
        raise TypeError(
            f"{type(owner).__name__}: {field} must be a number, got {value!r} "
            f"({type(value).__name__})"
        )
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if not (above and below):
        left, right = "(" if low_open else "[", ")" if high_open else "]"
        raise ValueError(
            f"{type(owner).__name__}: {field} must lie in {left}{low:g}, {high:g}{right}, "
            f"got {value!r}"
        )


def check_betas(owner: object, betas: tuple[float, float], eps: float) -> None:
    """Raise ValueError unless both betas of a rule of Adam's kind lie in [0, 1), and eps > 0."""
    for index, beta in enumerate(betas):
        require(owner, f"betas[{index}]", beta, high=1.0)
    require(owner, "eps", eps, low_open=True)


def check_eps(owner: object, eps: float, least: float, dtype: torch.dtype, remedy: str) -> None:
    """Refuse an ``eps`` that is lost in the precision of the moments.

    Args:
        owner: The optimizer whose hyperparameter it is.
        eps: The value found.
        least: The smallest number that ``eps`` goes into.
        dtype: The precision.
        remedy: What to do instead; closes the message.

    Raises:
        ValueError: ``least`` is 0 in ``dtype``.
    """
    if torch.tensor(least, dtype=dtype) == 0.0:
        raise ValueError(
            f"{type(owner).__name__}: eps={eps:g} is lost in {dtype}, the precision of the "
            f"moments, so a gradient of 0 would become NaN; {remedy}"
        )


def refuse_processes() -> None:
    """Refuse to train in several processes, whose parameters would drift apart.

    Raises:
        RuntimeError: ``torch.distributed`` runs more than one process.
    """
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        size = distributed.get_world_size()
        if size > 1:
            raise RuntimeError(
                f"bilevel: torch.distributed runs {size} processes, whose gradients are not "
                "averaged here, so that their parameters would drift apart; give "
                "BilevelSolver(collective=Replicas()), or run one process"
            )


def refuse_data_parallel(value: object) -> None:
    """Refuse a module or tensor that is spread over processes.

    Args:
        value: A module, its submodules included, or a tensor.

    Raises:
        ValueError: It is wrapped by ``DistributedDataParallel``, ``FullyShardedDataParallel`` or
            ``DataParallel``, or sharded by ``fully_shard``, or a parameter is a ``DTensor``.
    """
    if isinstance(value, torch.nn.Module):
        for name, module in value.named_modules():
            kind = type(module).__name__
            if kind in _WRAPPERS:
                raise ValueError(
                    f"bilevel: {name or 'the module'} is wrapped by {kind}, whose averaging of "
                    "gradients does not happen here; give the module inside (.module), and run one "
                    "process, or several with BilevelSolver(collective=Replicas())"
                )
            if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
                raise ValueError(
                    f"bilevel: {name or 'the module'} is sharded by fully_shard, which computes "
                    "with parameters of its own and ignores those that it is given; take "
                    "bilevel.sharded(module) and ResidentSolver(collective=Shards(...)), or leave "
                    "fully_shard out: BilevelSolver(collective=Replicas())"
                )
        for parameter in value.parameters():
            refuse_data_parallel(parameter)
    elif isinstance(value, torch.Tensor) and type(value).__name__ == "DTensor":
        raise ValueError(
            "bilevel: a parameter is a DTensor, spread over processes (fully_shard or tensor "
            "parallelism), which is not supported yet; give whole tensors "
            "(parameter.full_tensor()), and run one process, or several with "
            "BilevelSolver(collective=Replicas())"
        )


# By name: a class of theirs is only loaded where one of them is used.
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel")
