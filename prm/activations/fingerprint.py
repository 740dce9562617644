"""What the values that a model computes depend on, beside its inputs: fingerprints of it."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

import torch

from prm.models.model import PRM
from prm.tensor_cache import digest_tensors, fingerprint_of

_NOT_COMPUTING = frozenset({"_name_or_path", "transformers_version", "architectures", "dtype"})


def execution_facts(prm: PRM) -> dict[str, Any]:
    """Return how a model computes, its parameters apart.

    That is the configuration of the model, precision and kernel of attention, and, since they
    decide how sums are rounded, the device, the number of threads and the versions of torch and
    transformers.
    """
    return {
        "config": _computing(json.loads(prm.model.config.to_json_string(use_diff=False))),
        "attention": str(prm.model.config._attn_implementation),
        "autocast": str(prm.autocast),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "device": _device(prm.device),
    }


def front_fingerprint(prm: PRM) -> str:
    """Return the SHA-256 of all that the activations at a boundary depend on, beside its inputs.

    These are the boundary, the tensors in front of it, and ``execution_facts``.
    """
    boundary, state = prm.boundary, prm.model.state_dict()
    assert boundary is not None
    tensors = digest_tensors({name: state[name] for name in boundary.tensors})
    place = {"place": boundary.place, "layers": boundary.layers, "tensors": tensors}
    return fingerprint_of(place | execution_facts(prm))


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"cpu {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _computing(config: Any) -> Any:
    """Return a configuration without what does not change any value."""
    if not isinstance(config, dict):
        return config
    return {name: _computing(value) for name, value in config.items() if name not in _NOT_COMPUTING}
