"""Accept only checkpoints that transformers runs with its own classes, never remote code."""

from __future__ import annotations

from typing import Any

_ALTERNATIVES = {
    "internvl_chat": (
        "InternVL in its original layout: use the checkpoint of the same model whose name ends in "
        "'-hf' (OpenGVLab/InternVL3-1B-hf), or convert a local copy with `bilevel-prm "
        "convert-model`"
    ),
}


def refuse_remote_code(name: str) -> None:
    """Raise ValueError if a checkpoint needs code of its own; the message names what to use.

    Checked before transformers looks at the checkpoint, which would ask on the terminal.
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    config, _ = PreTrainedConfig.get_config_dict(name)
    kind = config.get("model_type")
    if kind in CONFIG_MAPPING:
        return
    known = "one that transformers has a class for (InternVL, Qwen2-VL, Qwen2.5-VL, Qwen2, Llama)"
    raise ValueError(
        f"expected a model that transformers has a class for, found {name} of type {kind!r}"
        + (", which needs code from the checkpoint" if "auto_map" in config else "")
        + f"; such code is never run. {_ALTERNATIVES.get(str(kind), f'Choose {known}')}"
    )


def load_image_processor(name: str, tokenizer: Any) -> Any:
    """Return the image processor of a checkpoint, or its whole processor.

    InternVL and Qwen2-VL need the image processor alone, which works without torchvision. Their
    whole processors need torchvision, since they include one for videos.

    Raises:
        ValueError: The processor cannot be built here; the message names what is missing.
    """
    from transformers import AutoImageProcessor, AutoProcessor

    images = AutoImageProcessor.from_pretrained(name, backend="pil")
    tiles = hasattr(images, "crop_to_patches") and hasattr(tokenizer, "start_image_token")
    if tiles or "image_grid_thw" in images.model_input_names:
        return images
    try:
        processor = AutoProcessor.from_pretrained(name)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the processor of {name} cannot be loaded: {reason}") from error
    if getattr(processor, "image_token", None) is None:
        raise ValueError(
            f"expected a processor that writes images out in text, found "
            f"{type(processor).__name__} of {name}; use InternVL, Qwen2-VL or another model whose "
            "processor has an image_token"
        )
    return processor
