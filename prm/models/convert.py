"""Convert an InternVL checkpoint folder from its original layout to that of transformers.

The original layout runs only with code from the checkpoint, which is never run here. Weights are
copied shard by shard with their bits unchanged. Names, shapes and the configuration are checked
before the first byte is written. ``prm.models.internvl_layout`` defines which tensors are renamed
and split.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from prm.files import atomic_write
from prm.models.internvl_layout import Layout, is_tied, layout_of, native_config

_INDEX = "model.safetensors.index.json"
_HEAD, _EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
    "{% elif part['type'] == 'video' %}{{ '<video>\\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_SHOWN = 5


def convert_internvl(source: str | Path, target: str | Path) -> dict[str, int]:
    """Write a checkpoint folder in the native layout from one in the original layout.

    Logits equal those of the original up to rounding, since the order of operations differs.
    Memory: two copies of one shard of the weights.

    Args:
        source: Folder with ``config.json``, ``*.safetensors`` and the tokenizer's files
            (``tokenizer.json``, or for Qwen ``vocab.json`` and ``merges.txt``).
        target: The folder to write, which must be missing or empty. It appears only when complete.

    Returns:
        The numbers written, ``{"tensors": ..., "parameters": ...}``.

    Raises:
        FileNotFoundError: A file is missing in ``source``.
        FileExistsError: ``target`` is not empty.
        ValueError: ``source`` is not such a checkpoint, or a tensor is missing, unknown, duplicate
            or of another shape than the configuration states.
    """
    source, target = Path(source), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty; remove it or choose another")
    config = _read_json(source / "config.json")
    layout = layout_of(config)
    tokenizer = _tokenizer(source, layout)
    native = native_config(config, tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"))
    tied = is_tied(config)
    shards = _shards(source)
    expected = _expected_shapes(native)
    _check(layout, shards, expected, tied=tied)
    with atomic_write(target) as unfinished:
        unfinished.mkdir(parents=True)
        count, native.dtype = _write_weights(layout, shards, unfinished, drop_head=tied)
        native.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        _image_processor(config, native).save_pretrained(unfinished)
        if (source / "generation_config.json").is_file():
            shutil.copyfile(
                source / "generation_config.json", unfinished / "generation_config.json"
            )
    return count


def _tokenizer(source: Path, layout: Layout) -> Any:
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    qwen = layout.text_type.startswith("qwen")
    kind = Qwen2Tokenizer if qwen else PreTrainedTokenizerFast
    files = [["tokenizer.json"], *([["vocab.json", "merges.txt"]] if qwen else [])]
    if not any(all((source / name).is_file() for name in names) for names in files):
        raise FileNotFoundError(
            f"expected {' or '.join(' and '.join(names) for names in files)} in {source}, found "
            "neither; a tokenizer that needs code from the checkpoint must be saved as "
            "tokenizer.json first"
        )
    plain = kind.from_pretrained(source)
    for name in ("<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>"):
        if plain.convert_tokens_to_ids(name) in (None, plain.unk_token_id):
            raise ValueError(f"{source}: expected a tokenizer with the token {name}, found none")
    tokenizer = kind.from_pretrained(source, extra_special_tokens=_TOKENS)
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _image_processor(config: Mapping[str, Any], native: Any) -> Any:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    height, width = native.vision_config.image_size
    return GotOcr2ImageProcessorPil(
        size={"height": height, "width": width},
        crop_to_patches=bool(config.get("dynamic_image_size", True)),
        min_patches=config.get("min_dynamic_patch", 1),
        max_patches=config.get("max_dynamic_patch", 12),
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def _shards(source: Path) -> list[Path]:
    if (source / _INDEX).is_file():
        names = sorted(set(_read_json(source / _INDEX)["weight_map"].values()))
        files = [source / name for name in names]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"expected {file}, which {_INDEX} names, found nothing")
        return files
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"expected *.safetensors in {source}, found none; weights in pickles (*.bin) are not "
            "read: save the model with safe_serialization=True"
        )
    return files


def _expected_shapes(native: Any) -> dict[str, tuple[int, ...]]:
    from transformers import InternVLForConditionalGeneration

    with torch.device("meta"):
        model = InternVLForConditionalGeneration(native)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _check(
    layout: Layout, shards: list[Path], expected: Mapping[str, tuple[int, ...]], *, tied: bool
) -> None:
    """Refuse names and shapes that the model of ``config.json`` lacks, without reading weights."""
    shard_of: dict[str, Path] = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                shape = tuple(file.get_slice(name).get_shape())
                for native, part in _checked_parts(layout, shard, name, shape):
                    if native in shard_of:
                        raise ValueError(
                            f"{name} is in {shard_of[native].name} and in {shard.name}; expected "
                            "it once: remove the shards that belong to another copy"
                        )
                    shard_of[native] = shard
                    if native in expected and part != expected[native]:
                        raise ValueError(
                            f"{shard}: {name}: expected shape {expected[native]} for {native} as "
                            f"config.json says, found {part}"
                        )
    missing = sorted(expected.keys() - shard_of.keys() - ({_HEAD} if tied else set()))
    unknown = sorted(shard_of.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            "expected the tensors of the model that config.json describes; "
            f"missing: {_some(missing)}; left over: {_some(unknown)} (native names)"
        )


def _checked_parts(
    layout: Layout, shard: Path, name: str, shape: tuple[int, ...]
) -> list[tuple[str, tuple[int, ...]]]:
    try:
        names = layout.native_names(name)
    except ValueError as error:
        raise ValueError(f"{shard}: {error}") from error
    return list(zip(names, layout.native_shapes(name, shape), strict=True))


def _write_weights(
    layout: Layout, shards: list[Path], directory: Path, *, drop_head: bool
) -> tuple[dict[str, int], torch.dtype]:
    """Write the weights shard by shard; return what was counted and the first tensor's dtype."""
    where: dict[str, str] = {}
    size = parameters = 0
    head_and_embedding: list[Tensor] = []
    dtype = torch.float32
    for number, shard in enumerate(shards, start=1):
        tensors: dict[str, Tensor] = {}
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                whole = file.get_tensor(name)
                parts = layout.native_tensors(name, whole)
                # safetensors refuses tensors that share memory, as the parts of one tensor do.
                parts = parts if len(parts) == 1 else tuple(part.clone() for part in parts)
                tensors |= zip(layout.native_names(name), parts, strict=True)
        if drop_head:
            head_and_embedding += [tensors[name] for name in (_HEAD, _EMBEDDING) if name in tensors]
            tensors.pop(_HEAD, None)
        target = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        target = target if len(shards) > 1 else "model.safetensors"
        for name, value in tensors.items():
            where[name] = target
            size += value.nbytes
            parameters += value.numel()
            dtype = value.dtype
        contiguous = {name: value.contiguous() for name, value in tensors.items()}
        save_file(contiguous, directory / target, metadata={"format": "pt"})
    if len(head_and_embedding) == 2 and not torch.equal(*head_and_embedding):
        raise ValueError(
            "config.json says tie_word_embeddings, but the head is not the embedding; set it to "
            "false if the model was trained with a head of its own"
        )
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (directory / _INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return {"tensors": len(where), "parameters": parameters}, dtype


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "none") + more


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"expected {path}, found nothing there")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, found {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
