"""Each rank's own gradient of the shards that this rank holds, in place of their mean.

``fully_shard`` sums the gradients of the ranks before anybody sees them, and a product ⟨μ, ∇ℓ_i⟩
needs each example's own. So the reduce-scatter of its backward pass is replaced by an all-to-all of
the same bytes: of every parameter each rank receives R rows, row r being rank r's gradient of the
receiver's shard. A row is multiplied with the local shard of μ, scaled, added to the gradient of
the step, and freed: no whole gradient ever exists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch import distributed as dist

from bilevel.replicas import called

# Parameter's name, and the gradients of its local shard by all ranks.
Receive: TypeAlias = Callable[[str, Float[Tensor, "ranks ..."]], None]


class GradientRows:
    """Backward passes through a sharded module.

    The module's FSDP modules get an exchange of their own, so that a backward pass outside of
    ``backward`` is an error from now on.

    Args:
        modules: The FSDP modules by name, outermost first.
        parameters: The trained parameters by name, sharded over one group on dimension 0.
        group: The group.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        parameters: Mapping[str, nn.Parameter],
        group: dist.ProcessGroup,
    ) -> None:
        self.ranks = dist.get_world_size(group)
        self._receive: Receive | None = None
        self._rows: Tensor | None = None
        self._missing: set[str] = set()
        entries = dict.fromkeys(modules, 0)
        for name, parameter in parameters.items():
            owner = max((one for one in modules if _holds(one, name)), key=len)
            entries[owner] += -(-parameter.shape[0] // self.ranks) * parameter.shape[1:].numel()
            parameter.register_post_accumulate_grad_hook(self._hook(name))
        for name, module in modules.items():
            sharded: Any = module
            sharded.set_custom_reduce_scatter(_Exchange(self, name, entries[name]))
            sharded.set_custom_all_gather(_Gather())
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
        self._names = frozenset(parameters)

    def backward(self, loss: Float[Tensor, ""], receive: Receive) -> None:
        """Differentiate a scalar; other leaves that it depends on accumulate into ``grad``.

        Args:
            loss: Of this rank; every rank calls this with one.
            receive: Is given the rows of each parameter, in the order in which they come. They are
                overwritten afterwards.

        Raises:
            ValueError: The loss does not depend on a trained parameter.
        """
        self._receive, self._missing = receive, set(self._names)
        try:
            if loss.requires_grad:
                torch.autograd.backward([loss])
        finally:
            self._receive = self._rows = None
        if self._missing:
            raise ValueError(_unused(sorted(self._missing)))

    def forget(self) -> None:
        """Free the rows of the module before."""
        self._rows = None

    def exchange(self, gradients: Tensor, group: dist.ProcessGroup) -> None:
        """Send each rank its part of a module's gradients, and keep what the others sent.

        Raises:
            RankError: Another rank is gone.
            RuntimeError: No backward pass of this object is running.
        """
        if self._receive is None:
            raise RuntimeError(
                "Shards: the backward pass of a sharded module belongs to the steps of its solver, "
                "and another one was started; train by ResidentSolver alone"
            )
        rows = torch.empty_like(gradients)
        called(lambda: dist.all_to_all_single(rows, gradients, group=group))
        self._rows = rows.view(self.ranks, -1)

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def use(parameter: Tensor) -> None:
            shard: Any
            shard, parameter.grad = parameter.grad, None
            self._use(name, shard.to_local())

        return use

    @torch.no_grad()
    def _use(self, name: str, shard: Tensor) -> None:
        """Hand on the rows of a parameter, which lie where its shard does in what was reduced."""
        if self._receive is None:
            raise RuntimeError(f"Shards: {name!r} got a gradient outside of a step")
        rows = shard[None]
        if self.ranks > 1:
            assert self._rows is not None
            start, length = shard.storage_offset(), self._rows.shape[1]
            if shard.untyped_storage().nbytes() != length * self._rows.itemsize:
                raise RuntimeError(
                    f"Shards: the gradient of {name!r} does not lie in what fully_shard reduced: "
                    "mixed precision and offloading are not done; leave mp_policy and "
                    "offload_policy out"
                )
            rows = self._rows[:, start : start + shard.numel()].view(self.ranks, *shard.shape)
        self._missing.discard(name)
        self._receive(name, rows)


class _Gather:
    """What ``FSDPModule.set_custom_all_gather`` takes (``AllGather``), with our errors."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for whole parameters."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Gather the shards of all ranks.

        Raises:
            RankError: Another rank is gone.
        """

        def gather() -> dist.Work | None:
            work: dist.Work | None = dist.all_gather_single(
                output_tensor, input_tensor, group=group, async_op=async_op
            )
            return work

        return called(gather)


class _Exchange:
    """What ``FSDPModule.set_custom_reduce_scatter`` takes (``ReduceScatter``)."""

    def __init__(self, owner: GradientRows, name: str, entries: int) -> None:
        self._owner, self._name, self._entries = owner, name, entries

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for what is sent, or for the sum."""
        self._owner.forget()
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Exchange the rows; the sum, which nobody looks at, is 0.

        Raises:
            ValueError: A parameter of the module has no gradient, or has one on some ranks only.
        """
        if input_tensor.numel() != self._owner.ranks * self._entries:
            raise ValueError(
                _unused([f"a parameter of {self._name or 'the root'}"])
                + "; and call fully_shard on one module at a time, not on a list"
            )
        self._owner.exchange(input_tensor, group)
        output_tensor.zero_()


def _holds(module: str, parameter: str) -> bool:
    return not module or parameter.startswith(f"{module}.")


def _unused(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"Shards: the loss does not depend on {shown}, on this rank at least; over shards every "
        "trained parameter needs a gradient on every rank: freeze what is not used before "
        "fully_shard (requires_grad=False)"
    )
