"""Load the parts of a checkpoint with transformers' own classes, never with code from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from prm.conventions import FILE, Conventions, read_conventions
from prm.inputs.tiles import MOST_PIXELS
from prm.models.untrusted import (
    ModelError,
    check_counts,
    is_finite,
    listed,
    no_larger_than,
    read_object,
    reading,
)
from prm.models.weight_files import (
    DIGESTS,
    INDEX,
    SINGLE,
    shard_names,
    tensor_shapes,
    unchanged,
    weight_files,
)
from prm.schema import DataError

_ALTERNATIVES = {
    "internvl_chat": (
        "InternVL in its original layout: use the checkpoint of the same model whose name ends in "
        "'-hf' (OpenGVLab/InternVL3-1B-hf), or convert a local copy with `bilevel-prm "
        "convert-model`"
    ),
}
_KNOWN = "one that transformers has a class for (InternVL, Qwen2-VL, Qwen2.5-VL, Qwen2, Llama)"
_ADAPTER = "adapter_config.json"
MOST_TILES = 1000
"""The largest accepted number of tiles per image: the grids that are compared are its square."""
_GRIDS = {  # of an image processor that makes grids, and of the vision tower
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
}


def load_config(name: str) -> Any:
    """Return the configuration of a checkpoint; the message of an error says what to use instead.

    Checked before transformers looks at the checkpoint, which could ask on the terminal, or build
    lists as long as a configuration says.

    Raises:
        FileNotFoundError: There is no ``config.json``.
        ModelError: The file is malformed, or the checkpoint needs code of its own.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    path = _found(name, "config.json")
    if path is None:
        # Transformers says the same of a repository without the file and of a hub out of reach.
        hub = "" if Path(name).is_dir() else " Or was the hub out of reach?"
        raise FileNotFoundError(f"expected config.json in {name}, found none; is it a model?{hub}")
    content = read_object(path)
    kind = content.get("model_type")
    if kind not in list(CONFIG_MAPPING.keys()):
        raise ModelError(
            f"{path}: expected a model that transformers has a class for, found {name} of type "
            f"{kind!r}"
            + (", which needs code from the checkpoint" if "auto_map" in content else "")
            + "; such code is never run. "
            + _ALTERNATIVES.get(str(kind), f"Choose {_KNOWN}")
        )
    check_counts(path, content)
    with reading(str(path)):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def load_model(
    model_class: Any, name: str, config: Any, *, dtype: torch.dtype, attn_implementation: str | None
) -> Any:
    """Return the model of a checkpoint, whose every parameter has a finite value from its files.

    The headers of the weight files are compared with the configuration before memory is allocated.

    Args:
        model_class: The Auto class of transformers.
        name: The folder, or the name on a hub.
        config: Its configuration, from ``load_config``.
        dtype: The dtype of the parameters.
        attn_implementation: As in ``from_pretrained``.

    Raises:
        FileNotFoundError: There are no safetensors files, or one is missing.
        ModelError: The weights are damaged, or not those of the configuration.
    """
    folder = _folder(name)
    if (folder / _ADAPTER).is_file():
        raise ModelError(
            f"{folder / _ADAPTER}: expected a whole model, found an adapter beside it; merge it "
            "into the weights (peft: merge_and_unload), or remove the file"
        )
    files = weight_files(folder)
    shapes = tensor_shapes(files)
    content = read_object(folder / "config.json")
    if content.get("transformers_weights") is not None:
        raise ModelError(
            f"{folder / 'config.json'}: transformers_weights: expected the weights in {SINGLE} or "
            f"{INDEX}, found {content['transformers_weights']!r}; rename the file"
        )
    with (
        unchanged(folder, files),
        reading(f"the model in {name}"),
        no_larger_than(shapes, content, str(name)),
    ):
        model, report = model_class.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, with their names
            output_loading_info=True,
        )
    _check_complete(name, model, report)
    _check_finite(name, model)
    return model


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer of a checkpoint.

    Raises:
        ModelError: It is missing, damaged, or needs code of its own or another package.
    """
    from transformers import AutoTokenizer

    with reading(f"the tokenizer in {name}"):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def load_image_processor(name: str, tokenizer: Any, config: Any) -> Any:
    """Return the image processor of a checkpoint, or its whole processor.

    InternVL and Qwen2-VL need the image processor alone, which works without torchvision. Their
    whole processors need torchvision, since they include one for videos.

    Raises:
        ModelError: The processor cannot be built here; the message names what is missing.
    """
    from transformers import AutoImageProcessor, AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    with reading(f"the image processor in {name}"):
        images = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
    tiles = hasattr(images, "crop_to_patches") and hasattr(tokenizer, "start_image_token")
    if tiles or "image_grid_thw" in images.model_input_names:
        with reading(f"the image processor in {name}"):
            (_check_tiles if tiles else _check_grids)(name, images, config)
        return images
    # AutoProcessor does not pass trust_remote_code on to the class that it finds by the model.
    known = type(config) in PROCESSOR_MAPPING
    kind = PROCESSOR_MAPPING[type(config)] if known else AutoProcessor
    with reading(f"the processor in {name}"):
        processor = kind.from_pretrained(name, trust_remote_code=False)
    if getattr(processor, "image_token", None) is None:
        raise ModelError(
            f"expected a processor that writes images out in text, found "
            f"{type(processor).__name__} of {name}; use InternVL, Qwen2-VL or another model whose "
            "processor has an image_token"
        )
    return processor


def load_conventions(name: str, plus_id: int, minus_id: int) -> Conventions | None:
    """Return the conventions of a checkpoint, None if it does not say.

    Args:
        name: The folder, or the name on a hub.
        plus_id: The token id of "+" in its tokenizer.
        minus_id: The token id of "-" in its tokenizer.

    Raises:
        DataError: They are damaged, of a newer version, or name other label tokens.
    """
    path = _found(name, FILE)
    if path is None:
        return None
    conventions = read_conventions(path)
    found = (conventions.plus_id, conventions.minus_id)
    if found != (plus_id, minus_id):
        raise DataError(
            expected=f'the ids of the tokenizer, {{"+": {plus_id}, "-": {minus_id}}}',
            found=f'{{"+": {found[0]}, "-": {found[1]}}}',
            file=path,
            field="labels",
            remedy="use the tokenizer and the conventions of one model",
        )
    return conventions


def write_processor_config(folder: Path, config: Any, images: Any) -> None:
    """Write what ``AutoProcessor`` needs to know beside an image processor that stands alone.

    Without the number of tokens of a tile the processor of InternVL takes 256, whatever the model.
    """
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    tokens = getattr(config, "image_seq_length", None)
    if (
        tokens is None
        or hasattr(images, "image_processor")
        or type(config) not in PROCESSOR_MAPPING
    ):
        return
    content = {
        "image_seq_length": tokens,
        "processor_class": PROCESSOR_MAPPING[type(config)].__name__,
    }
    (folder / "processor_config.json").write_text(json.dumps(content, indent=2) + "\n")


def _check_tiles(name: str, images: Any, config: Any) -> None:
    """Refuse tiles of another size than the vision tower's, or so many that comparing hangs."""
    side = config.vision_config.image_size
    wanted = [side, side] if isinstance(side, int) else list(side)
    found = [images.size["height"], images.size["width"]]
    if found != wanted:
        raise ModelError(
            f"{name}: expected tiles of {wanted} pixels (vision_config.image_size), found {found} "
            "in preprocessor_config.json; use the files of one model"
        )
    if not isinstance(images.max_patches, int) or not 1 <= images.max_patches <= MOST_TILES:
        raise ModelError(
            f"{name}: preprocessor_config.json: max_patches: expected 1 to {MOST_TILES}, found "
            f"{images.max_patches!r}"
        )


def _check_grids(name: str, images: Any, config: Any) -> None:
    """Refuse patches of another size than the vision tower's, or pictures made huge."""
    for here, there in _GRIDS.items():
        found, wanted = getattr(images, here, None), getattr(config.vision_config, there, None)
        if None not in (found, wanted) and found != wanted:
            raise ModelError(
                f"{name}: preprocessor_config.json: {here}: expected {wanted} "
                f"(vision_config.{there}), found {found}; use the files of one model"
            )
    least = (images.size or {}).get("shortest_edge") or 0
    if least > MOST_PIXELS:
        raise ModelError(
            f"{name}: preprocessor_config.json: expected pictures of at most {MOST_PIXELS} pixels "
            f"as the smallest size, found {least}"
        )


def _found(name: str, file: str) -> Path | None:
    """Return the path of a file of a checkpoint, after fetching it if ``name`` is on a hub."""
    if Path(name).is_dir():
        return Path(name) / file if (Path(name) / file).is_file() else None
    from transformers.utils import cached_file

    path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(path)


def _folder(name: str) -> Path:
    """Return the folder of a checkpoint with its weights, which are fetched if it is on a hub."""
    if Path(name).is_dir():
        return Path(name)
    for file in (_ADAPTER, DIGESTS):
        _found(name, file)
    if _found(name, SINGLE) is None and (index := _found(name, INDEX)) is not None:
        for shard in shard_names(index):
            _found(name, shard)
    config = _found(name, "config.json")
    assert config is not None  # load_config has read it
    return config.parent


def _check_complete(name: str, model: Any, report: dict[str, Any]) -> None:
    """Refuse weights that are missing, of another shape, or left over in a part of the model.

    What no part of the model could have used is harmless: value heads that trainers add, say. What
    transformers itself expects to be left over, such as buffers of old versions, is not reported.
    """
    parts = {part for part, _ in model.named_children()}
    parts |= {part for part, _ in model.base_model.named_children()}
    shapes = [
        f"{tensor} (expected {tuple(wanted)}, found {tuple(found)})"
        for tensor, found, wanted in sorted(report["mismatched_keys"])
    ]
    missing = sorted(report["missing_keys"])
    extra = sorted(key for key in report["unexpected_keys"] if key.partition(".")[0] in parts)
    kinds = {"missing": missing, "of another shape": shapes, "left over": extra}
    wrong = [f"{kind}: {listed(names)}" for kind, names in kinds.items() if names]
    if wrong:
        raise ModelError(
            f"{name}: expected the tensors of the model that config.json describes; "
            f"{'; '.join(wrong)}; use the weights and the configuration of one model"
        )


def _check_finite(name: str, model: Any) -> None:
    wrong = [key for key, value in model.named_parameters() if not is_finite(value)]
    if wrong:
        raise ModelError(
            f"{name}: expected finite weights, found NaN or infinite values in {listed(wrong)}; "
            "the training that wrote them had diverged, or the files are damaged"
        )
