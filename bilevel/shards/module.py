"""A module sharded by ``fully_shard`` as a function of the parameters that it owns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from bilevel import tree
from bilevel.shards.gradient_rows import GradientRows
from bilevel.tree import TreeT


class ShardedModule:
    """A sharded module as a function ``f(params, *args, **kwargs)``; made by ``sharded(module)``.

    Such a module computes with parameters of its own whatever it is given, so ``params`` must be
    these: ``module_params``, which ``ResidentSolver`` moves in place.

    Attributes:
        module: The module.
        names: Names of the trained parameters, each once.
        group: The processes that it is spread over.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._parts = _fsdp_modules(module)
        self._reshard()
        self._own: dict[str, nn.Parameter] = {
            name: parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self.names = tuple(self._own)
        self._mesh = _only_mesh(self._own)
        self.group: dist.ProcessGroup = self._mesh.get_group()
        self.rows = GradientRows(self._parts, self._own, self.group)

    def __repr__(self) -> str:
        return (
            f"sharded({type(self.module).__name__}: {len(self.names)} parameters over "
            f"{self.rows.ranks} ranks)"
        )

    @property
    def module_params(self) -> dict[str, Tensor]:
        """This rank's shards of the trained parameters, in the module's own memory."""
        return {name: _local(parameter) for name, parameter in self._own.items()}

    def __call__(self, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Return ``module(*args, **kwargs)``; every rank must call it.

        Args:
            params: ``module_params``, or tensors in the same memory.
            *args: As the module takes them.
            **kwargs: As the module takes them.

        Raises:
            ValueError: Other parameters, or the call has changed a buffer.
        """
        self.check_own(params)
        self._reshard()  # else a module that is kept whole computes with θ of before the last step
        buffers = [(name, buffer, buffer._version) for name, buffer in self.module.named_buffers()]
        result = self.module(*args, **kwargs)
        for name, buffer, version in buffers:
            if buffer._version != version:
                raise ValueError(
                    f"sharded: the call has changed the buffer {name!r} (running statistics of "
                    "batch normalisation?), which would differ between ranks; freeze it (eval())"
                )
        return result

    def check_own(self, params: Mapping[str, Tensor]) -> None:
        """Refuse parameters that are not the module's own, which it would ignore.

        Raises:
            ValueError: They are others, or the module has got others since ``sharded(module)``.
        """
        own = self.module_params
        for name in sorted(own.keys() | params.keys()):
            mine, given = own.get(name), params.get(name)
            if mine is None or given is None or not _same_memory(mine, given):
                raise ValueError(
                    f"sharded: {name!r} is not the module's own shard; a module sharded by "
                    "fully_shard computes with its own parameters, whatever it is given: start "
                    "ResidentSolver from f.module_params, and call f with the θ of the loss"
                )

    def distributed(self, state: TreeT) -> TreeT:
        """Return a state with a ``DTensor`` for each shard, in the same memory.

        For ``torch.distributed.checkpoint``, whose ``save`` and ``load`` take
        ``bilevel.tree.flatten`` of it, on any number of ranks. ``load`` writes where the state
        lives, and so into the module.

        Args:
            state: θ, or a ``BilevelState``, whose θ, lower optimizer and memory are shards.
        """
        names = tree.names(state)
        sharded = [_is_lower(name) for name in names]
        flat = tree.flatten(state)
        found = {
            name: self._dtensor(name.rpartition("/")[2], leaf)
            if here and name.rpartition("/")[2] in self._own
            else leaf
            for (name, leaf), here in zip(flat.items(), sharded, strict=True)
        }
        return _rebuilt(state, found)

    def gathered(self, state: TreeT) -> TreeT:
        """Return a state with whole tensors in place of the shards; every rank must ask for it."""
        return tree.map(_whole, self.distributed(state))

    @torch.no_grad()
    def whole(self) -> Iterator[tuple[list[str], Tensor]]:
        """Yield each tensor of the module's state dict whole, one after the other, with its names.

        Every rank must take all of them. No more than one is held: copy what is to stay.
        """
        self._reshard()
        named: dict[int, tuple[list[str], Tensor]] = {}
        for name, leaf in self.module.state_dict(keep_vars=True).items():
            named.setdefault(id(leaf), ([], leaf))[0].append(name)
        for names, leaf in named.values():
            yield names, _whole(leaf.detach())

    def _dtensor(self, name: str, shard: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        whole: Any = self._own[name]
        return DTensor.from_local(
            shard,
            self._mesh,
            whole.placements,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )

    def _reshard(self) -> None:
        for part in self._parts.values():
            one: Any = part
            one.reshard()


def sharded(module: nn.Module) -> ShardedModule:
    """Return a module that ``fully_shard`` has spread over processes as a function.

    ::

        for block in module.blocks:
            fully_shard(block)
        fully_shard(module)
        f = bilevel.sharded(module)
        problem = ReweightingProblem(lambda theta, batch: losses(f(theta, batch)), ...)
        solver = ResidentSolver(
            problem, AdamW(1e-5), Adam(1e-2), OneStep(Dot(), "upper-first"),
            collective=Shards(f),
        )
        state = solver.init(f.module_params, phi)

    The ranks must have been given the same values before ``fully_shard``. Freeze what is not
    trained before it, too, and tie parameters only inside one sharded module: ``fully_shard``
    unties others.

    Args:
        module: Of which every trained parameter is sharded on dimension 0 over one group.

    Raises:
        RuntimeError: torch is too old.
        TypeError: The module itself is not sharded.
        ValueError: A parameter is sharded in another way, or nothing is trained.
    """
    return ShardedModule(module)


def is_fsdp(module: nn.Module) -> bool:
    """Return whether ``fully_shard`` was called on a module; by name, so that none is loaded."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def _fsdp_modules(module: nn.Module) -> dict[str, nn.Module]:
    if not isinstance(module, nn.Module) or not is_fsdp(module):
        raise TypeError(
            "sharded: expected a module on which torch.distributed.fsdp.fully_shard was called "
            f"last, found a {type(module).__name__}; for a whole module take "
            "bilevel.functional(module)"
        )
    if not hasattr(module, "set_custom_reduce_scatter"):
        raise RuntimeError(
            f"sharded: torch {torch.__version__} has no FSDPModule.set_custom_reduce_scatter, by "
            "which each rank's own gradient is kept; install torch 2.13"
        )
    return {name: one for name, one in module.named_modules() if is_fsdp(one)}


def _only_mesh(own: Mapping[str, nn.Parameter]) -> Any:
    """Return the mesh that all parameters are sharded over."""
    from torch.distributed.tensor import DTensor, Shard

    meshes = []
    for name, parameter in own.items():
        if not isinstance(parameter, DTensor) or parameter.placements != (Shard(0),):
            where = getattr(parameter, "placements", "not at all")
            raise ValueError(
                f"sharded: expected {name!r} sharded on dimension 0 over one group, found "
                f"{where}; tensor parallelism, replicated groups (a mesh of two dimensions), "
                "other placements and ignored_params are not done: choose fully_shard(module) over "
                "a mesh of one dimension"
            )
        meshes.append(parameter.device_mesh)
    if not meshes or any(mesh != meshes[0] for mesh in meshes):
        raise ValueError(
            "sharded: expected trained parameters, all sharded over one mesh, found "
            f"{len(set(map(str, meshes)))} meshes"
        )
    return meshes[0]


@torch.no_grad()
def _local(parameter: Any) -> Tensor:
    shard: Tensor = parameter.to_local()
    return shard.detach()


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and (
        not one.numel() or (one.data_ptr() == other.data_ptr() and one.dtype == other.dtype)
    )


def _is_lower(path: str) -> bool:
    """Return whether a leaf of a ``BilevelState``, or of θ, is like θ."""
    first, _, rest = path.partition("/")
    return not rest or first in ("lower_params", "lower_optimizer", "memory")


def _rebuilt(state: TreeT, found: Mapping[str, Tensor]) -> TreeT:
    leaves = iter(found.values())
    rebuilt: TreeT = tree.map(lambda _: next(leaves), state)
    return rebuilt


@torch.no_grad()
def _whole(leaf: Any) -> Tensor:
    whole: Tensor = leaf.full_tensor() if hasattr(leaf, "full_tensor") else leaf
    return whole
