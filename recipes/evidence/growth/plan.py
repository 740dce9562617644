"""What a step costs past one machine: formulas, and two assumptions on the hardware.

Nothing here is measured on several machines. The counts come from what is: a bilevel iteration of
``Dot`` takes 6F (``results/bench.json``), holds 5 copies of θ in order upper-first
(``results/bench_copies.json``), and sends two gradients of θ per step (the axis "ranks" of
``results/growth.json``). Sharded is everything that is as large as θ: each of R ranks holds 1/R of
it, gathers a layer before it computes with it (again in the backward pass), and sends its gradient
to the shards. For ``Dot`` each rank's own gradient has to meet μ before the sum, so that an
all-to-all takes the place of the reduce-scatter; it moves the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Model:
    """A model and the sequences that it is trained on.

    Attributes:
        parameters: θ.
        active: Those that each token passes in the language model: all but the embeddings.
        tokens: Of a sequence.
        layers: Of the language model.
        width: Of the language model.
        tower_flops: Of the vision tower for the tiles of an example.
    """

    parameters: float
    active: float
    tokens: int
    layers: int
    width: int
    tower_flops: float

    @property
    def forward_flops(self) -> float:
        """F of an example: 2 per parameter and token, 2 T² d per layer of causal attention."""
        attention = 2 * self.tokens**2 * self.width * self.layers
        return 2 * self.active * self.tokens + attention + self.tower_flops


@dataclass(frozen=True)
class Cluster:
    """Devices and the links between them.

    Attributes:
        nodes: Machines.
        per_node: Devices of a machine.
        flops: Dense peak of a device in bfloat16.
        utilisation: The share of it that a step reaches: an assumption.
        inside: Bytes per second from a device to the others of its machine, in one direction.
        outside: Likewise to other machines.
    """

    nodes: int
    per_node: int = 8
    flops: float = 989e12
    utilisation: float = 0.35
    inside: float = 450e9
    outside: float = 50e9

    @property
    def devices(self) -> int:
        """All devices."""
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Method:
    """How a step is taken.

    Attributes:
        copies: Copies of θ in float32 that the ranks share out: 5 for ``Dot`` upper-first.
        every: Upper steps that share an upper gradient.
        upper: Whether there is an upper level.
        across: "shards": θ is divided among all devices; "replicas": among those of a machine, and
            the machines hold the same.
    """

    copies: int = 5
    every: int = 1
    upper: bool = True
    across: str = "shards"


INTERNVL3_8B = Model(7.94e9, 6.53e9, 1980, 28, 3584, 3.62e12)
"""Five tiles and 700 tokens of text: InternViT-300M beside Qwen2.5-7B."""

_WIDE, _NARROW = 4, 2  # bytes: of what is held and summed, and of what layers compute with


def passes(method: Method) -> float:
    """Return the forward and backward passes of a step: 1, and 1 / N of the upper level."""
    return 1 + (1 / method.every if method.upper else 0)


def planned(model: Model, cluster: Cluster, method: Method, examples: int) -> dict[str, Any]:
    """Return the derived figures of a step, per device.

    Args:
        model: The model.
        cluster: The devices.
        method: The step.
        examples: Of each level, per device, in one micro-batch.

    Returns:
        ``state_bytes``, copies · 4 θ / shards; ``flops``, 3F · passes · examples; bytes sent
        ``inside`` and ``outside`` a machine; the seconds of each; ``efficiency``, the share of the
        time that the device computes if sending and computing overlap.
    """
    shards = cluster.devices if method.across == "shards" else cluster.per_node
    theta, turns = model.parameters, passes(method)
    # Twice gathered in the precision of the layers, once summed in that of the state.
    sharded = turns * (2 * _NARROW + _WIDE) * theta * (shards - 1) / shards
    between = 0.0
    if method.across == "replicas" and cluster.nodes > 1:
        ring = 2 * (cluster.nodes - 1) / cluster.nodes
        between = turns * ring * _WIDE * theta / shards
    crosses = method.across == "shards" and cluster.nodes > 1
    inside, outside = (0.0, sharded) if crosses else (sharded, between)
    flops = 3 * model.forward_flops * turns * examples
    computing = flops / (cluster.utilisation * cluster.flops)
    sending = max(inside / cluster.inside, outside / cluster.outside)
    return {
        "devices": cluster.devices,
        "across": method.across,
        "every": method.every if method.upper else None,
        "examples": examples * cluster.devices,
        "state_bytes": method.copies * _WIDE * theta / shards,
        "flops": flops,
        "inside_bytes": inside,
        "outside_bytes": outside,
        "computing_seconds": computing,
        "sending_seconds": sending,
        "efficiency": computing / max(computing, sending),
        "examples_per_second": examples * cluster.devices / max(computing, sending),
    }


def table() -> list[dict[str, Any]]:
    """Return the plan for an 8B model on 8 and on 64 devices."""
    one, eight = Cluster(1), Cluster(8)
    rows = [
        (one, Method(copies=4, upper=False), 1),
        (one, Method(), 1),
        (one, Method(copies=6, every=5), 1),
        (eight, Method(), 1),
        (eight, Method(), 8),
        (eight, Method(across="replicas"), 1),
    ]
    return [planned(INTERNVL3_8B, *row) for row in rows]
