"""``--sharding full``: each process of a command holds a part of the model (FSDP2).

``fully_shard`` is called on every layer of the language model, and on the step head, the module
that is called, with all else: embeddings, head, and what stands in front of the language model. So
the processes gather the same parts in the same order whether their examples have pictures or not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bilevel import Collective, ShardedModule, sharded
from bilevel.replicas import apart
from prm.models.boundary import language_layers
from prm.models.model import PRM, save_state, step_head
from prm.placement import Placement
from prm.tensor_cache import digest_tensors
from recipes.models.loading import adapted, load_model, placement_of
from recipes.options.train import LowerOptions, TrainOptions
from recipes.options.values import OptionError
from recipes.ranks import group_of_one, ranks_here


@dataclass(frozen=True)
class Trained:
    """The model of a run, and what of it is trained.

    Attributes:
        prm: The model.
        lower: The trained parameters by name, θ.
        shards: What the model is in parts, None if each process has all of it.
        digest: The digest of the whole model then (``recipes.run.identity``), known to rank 0.
    """

    prm: PRM
    lower: dict[str, Tensor]
    shards: ShardedModule | None = None
    digest: str = ""

    @property
    def identified(self) -> nn.Module | str:
        """The model, or its digest, for the identity of the run."""
        model: nn.Module = self.prm.model
        return model if self.shards is None else self.digest


def load_trained(options: LowerOptions, placement: Placement, path: str | None = None) -> Trained:
    """Load the model before the first step, with adapters or in parts as the options say.

    Args:
        options: The options of the run.
        placement: Where it computes.
        path: The value of ``--init-from``, None for ``--model``.

    Raises:
        OptionError: As ``load_model`` and ``adapted``.
    """
    freeze = options.lower.freeze
    if options.sharding == "none":
        prm, lower = load_model(options, freeze, path, placement)
        if options.lora.rank:
            lower = adapted(prm, options.lora, freeze, placement)
        return Trained(prm, lower)
    prm, own = load_model(options, freeze, path, placement, cloned=False)
    digest = digest_tensors(prm.model.state_dict()) if ranks_here().rank == 0 else ""
    names = list(own)
    del own  # which would hold the whole model
    prm, shards = spread(prm, names)
    return Trained(prm, shards.module_params, shards, digest)


def check_sharding(options: LowerOptions, placement: Placement, ranks: Collective) -> None:
    """Refuse a run whose steps cannot be taken over shards, before the model is loaded.

    Args:
        options: The options of the run.
        placement: Where it computes.
        ranks: The processes of the command.

    Raises:
        OptionError: It computes elsewhere than on CPUs in float32, or a process would have no part
            of a meta batch, or another number of micro-batches than the others.
    """
    if options.sharding == "none":
        return
    if placement.device.type != "cpu" or placement.precision != "float32":
        raise OptionError(
            f"--sharding full: not shown to be right on {placement.device} in "
            f"{placement.precision}; use --device cpu --precision float32"
        )
    count, accumulation = ranks.ranks, options.lower.accumulation
    if accumulation % count:
        raise OptionError(
            f"--sharding full --accumulation {accumulation}: the {count} processes need as many "
            f"micro-batches each; give a multiple of {count}"
        )
    if isinstance(options, TrainOptions) and options.weighting.kind != "none":
        size = options.upper.meta_batch_size
        if size < count:
            raise OptionError(
                f"--sharding full --meta-batch-size {size}: each of the {count} processes needs a "
                f"solution at least; give {count} or more"
            )


@contextmanager
def over_shards(options: LowerOptions) -> Iterator[None]:
    """Run a command that may shard: alone it is a group of one.

    Over shards an error of the body is told to no other process: these may be in an exchange of
    parameters, and end when this one does.

    Raises:
        OptionError: As ``check_sharding``.
        bilevel.RankError: Another process has failed before.
    """
    if options.sharding == "none":
        yield
        return
    ranks = ranks_here()
    check_sharding(options, placement_of(options.placement), ranks)
    ranks.numbers(0)  # so far all can be told
    with group_of_one(), apart():
        yield


def spread(prm: PRM, trained: Sequence[str]) -> tuple[PRM, ShardedModule]:
    """Spread a model over the processes, in place; each is left with a part of its parameters.

    Args:
        prm: The model, the same on all of them.
        trained: The names of the parameters that are trained.

    Returns:
        The model as it is called now, and the function of its parts: θ is its ``module_params``.
    """
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for name in trained:
        prm.model.get_parameter(name).requires_grad_(True)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    head = step_head(prm)
    for part in (*language_layers(prm.model), head):
        fully_shard(part, mesh=mesh)
    f = sharded(head)
    return replace(prm, spread=f), f


def save_spread(prm: PRM, f: ShardedModule, directory: Path, *, writes: bool) -> None:
    """Write the whole model on one process; all of them have to call this.

    Tensors are gathered one at a time. Each goes to a file of its own first, which is then mapped,
    so that there is no copy of the model in memory.

    Args:
        prm: The model.
        f: Its parts.
        directory: As of ``save_prm``.
        writes: Whether this process writes.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".model-", dir=directory.parent) as folder:
        files: dict[Path, list[str]] = {}
        for number, (names, leaf) in enumerate(f.whole()):
            if writes:
                file = Path(folder) / f"{number}.safetensors"
                save_file({"leaf": leaf.contiguous()}, file)
                files[file] = names
        if writes:
            # Mapped at the end: what is kept between large tensors breaks up the freed memory.
            mapped = {file: load_file(file)["leaf"] for file in files}
            state = {
                name.removeprefix("model."): mapped[file]
                for file, names in files.items()
                for name in names
            }
            save_state(prm, state, directory)
