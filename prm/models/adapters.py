"""Low-rank adapters (LoRA) by the library peft: few trained parameters beside a frozen model.

A linear layer x ↦ W x with an adapter computes W x + (α / r) B A x, with A [r, in] and B [out, r];
W does not change. Source: Hu et al. 2021 (arXiv 2106.09685). B starts at 0, so new adapters do not
change what the model computes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prm.files import atomic_write, write_lines

_ADAPTER = "default"  # peft's name of the only adapter
_BASE = ".base_layer."


def add_lora(
    model: Any,
    *,
    rank: int = 16,
    alpha: float | None = None,
    targets: Sequence[str] = (),
    freeze: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Add adapters to linear layers of ``model``; return their parameters by name, detached.

    The parameters are float32, or of the model's dtype if that is wider, and drawn from torch's
    generator. Pass them, or their trained values, to ``prm.models.model.step_logits``; all other
    parameters keep the model's values.

    Args:
        model: The model, which is changed in place: the layers become those of peft, and their
            weights get peft's names (``...q_proj.base_layer.weight``).
        rank: The rank r.
        alpha: The scale α. None means 2 r.
        targets: Last names of the layers, such as ``q_proj``. Empty means every linear layer except
            the head.
        freeze: Parts without adapters, as in ``prm.models.model.split_parameters``.

    Raises:
        ValueError: The rank is less than 1, a target names no linear layer, or the model has an
            adapter already.
        ModuleNotFoundError: The library peft is not installed.
    """
    if rank < 1:
        raise ValueError(f"expected a LoRA rank of 1 or more, found {rank}")
    if adapter_parameters(model):
        raise ValueError("expected a model without adapters, found one that has some")
    peft = _peft()
    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module is not head
        and not any(f".{part}." in f".{name}." for part in freeze)
    ]
    chosen = [name for name in linear if not targets or name.rpartition(".")[2] in targets]
    unused = set(targets) - {name.rpartition(".")[2] for name in linear}
    if unused or not chosen:
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(
            "expected names of linear layers that are not frozen for LoRA, found "
            f"{', '.join(map(repr, sorted(unused))) or 'none'}; there are "
            f"{', '.join(known) or 'none'}"
        )
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank if alpha is None else alpha, target_modules=chosen
    )
    peft.inject_adapter_in_model(config, model, _ADAPTER)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if _is_adapters(name):
            parameter.data = parameter.data.to(torch.promote_types(model.dtype, torch.float32))
    return adapter_parameters(model)


def adapter_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter parameters of ``model`` by name, detached; empty if it has none."""
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if _is_adapters(name)
    }


def merged(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of the model without adapters, whose weights are W + (α / r) B A.

    The sum is computed in float32 or wider and rounded to W's dtype. If ``model`` has no adapters,
    the state is returned unchanged.
    """
    result = {
        name.replace(_BASE, "."): value for name, value in state.items() if not _is_adapters(name)
    }
    for name, module in model.named_modules():
        if not _has_adapter(module):
            continue
        weight = state[f"{name}{_BASE}weight"]
        down, up = (state[f"{name}.lora_{side}.{_ADAPTER}.weight"] for side in "AB")
        delta = module.scaling[_ADAPTER] * (up @ down)
        result[f"{name}.weight"] = (weight.to(delta.dtype) + delta).to(weight.dtype)
    return result


def save_adapter(
    model: Any, params: Mapping[str, Tensor], directory: str | Path, base: str | None = None
) -> None:
    """Write the adapters alone: ``peft.PeftModel.from_pretrained(base, directory)`` loads them.

    Args:
        model: The model with adapters.
        params: Values of the adapters by name. Those that are not named keep the model's values.
        directory: The folder, which is created if it is missing and must not hold an adapter yet.
        base: Name of the checkpoint that the adapters belong to. It is written to the
            configuration.

    Raises:
        FileExistsError: The folder holds an adapter already.
        ValueError: The model has no adapters.
    """
    values = adapter_parameters(model)
    if not values:
        raise ValueError("expected a model with adapters, found none: use add_lora first")
    directory = Path(directory)
    file = directory / "adapter_model.safetensors"
    if file.exists():
        raise FileExistsError(f"{file} exists; remove it or choose another directory")
    directory.mkdir(parents=True, exist_ok=True)
    values |= {name: value.detach() for name, value in params.items() if name in values}
    # peft names parameters as below its wrapper, without the name of the adapter.
    files = {
        f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}": value.cpu().contiguous()
        for name, value in values.items()
    }
    config = model.peft_config[_ADAPTER].to_dict()
    config |= {"base_model_name_or_path": base, "inference_mode": True}
    content = {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()}
    write_lines(directory / "adapter_config.json", [json.dumps(content, indent=2)])
    with atomic_write(file) as unfinished:
        save_file(files, unfinished, metadata={"format": "pt"})


def _is_adapters(name: str) -> bool:
    return f".lora_A.{_ADAPTER}." in name or f".lora_B.{_ADAPTER}." in name


def _has_adapter(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and _ADAPTER in getattr(module, "lora_A", {})


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "LoRA needs the library peft: pip install 'bilevel-prm[peft]'"
        ) from error
    return peft
