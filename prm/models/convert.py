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

from prm.conventions import FILE, read_conventions, write_conventions
from prm.files import atomic_write
from prm.models.internvl_layout import Layout, is_tied, layout_of, native_config
from prm.models.native import MOST_TILES, write_processor_config
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
    INDEX,
    SINGLE,
    index_shards,
    tensor_shapes,
    weight_files,
    write_digests,
)

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


def convert_internvl(source: str | Path, target: str | Path) -> dict[str, int]:
    """Write a checkpoint folder in the native layout from one in the original layout.

    Logits equal those of the original up to rounding, since the order of operations differs.
    Memory: two copies of one shard of the weights.

    Args:
        source: Folder with ``config.json``, ``*.safetensors`` and the tokenizer's files
            (``tokenizer.json``, or for Qwen ``vocab.json`` and ``merges.txt``). The original layout
            does not say how a reward model is asked; a ``prm.json`` that was added to it is taken.
        target: The folder to write, which must be missing or empty. It appears only when complete.

    Returns:
        The numbers written, ``{"tensors": ..., "parameters": ...}``.

    Raises:
        FileNotFoundError: A file is missing in ``source``.
        FileExistsError: ``target`` is not empty.
        DataError: A ``prm.json`` in ``source`` is damaged.
        ModelError: ``source`` is not such a checkpoint, a file is damaged, or a tensor is missing,
            unknown, duplicate, not finite, or of another shape than the configuration states. It
            is a ``ValueError``.
    """
    source, target = Path(source), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty; remove it or choose another")
    config = read_object(source / "config.json")
    check_counts(source / "config.json", config)
    with reading(str(source / "config.json")):
        layout = layout_of(config)
        tied = is_tied(config)
    tokenizer = _tokenizer(source, layout)
    with reading(str(source / "config.json")):
        native = native_config(config, tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"))
    shards = _shards(source)
    with reading(str(source)), no_larger_than(tensor_shapes(shards), config, str(source)):
        expected = _expected_shapes(native)
    _check(layout, shards, expected, tied=tied)
    images = _image_processor(config, native)
    asked = read_conventions(source / FILE) if (source / FILE).is_file() else None
    with atomic_write(target) as unfinished:
        unfinished.mkdir(parents=True)
        count, native.dtype = _write_weights(layout, shards, unfinished, drop_head=tied)
        native.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        images.save_pretrained(unfinished)
        write_processor_config(unfinished, native, images)
        if (source / "generation_config.json").is_file():
            shutil.copyfile(
                source / "generation_config.json", unfinished / "generation_config.json"
            )
        if asked is not None:
            write_conventions(unfinished / FILE, asked)
        write_digests(unfinished)
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
    with reading(f"the tokenizer in {source}"):
        plain = kind.from_pretrained(source, trust_remote_code=False)
    for name in ("<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>"):
        if plain.convert_tokens_to_ids(name) in (None, plain.unk_token_id):
            raise ModelError(f"{source}: expected a tokenizer with the token {name}, found none")
    tokenizer = kind.from_pretrained(source, extra_special_tokens=_TOKENS, trust_remote_code=False)
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _image_processor(config: Mapping[str, Any], native: Any) -> Any:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    height, width = native.vision_config.image_size
    most = config.get("max_dynamic_patch", 12)
    if not isinstance(most, int) or not 1 <= most <= MOST_TILES:
        raise ModelError(
            f"config.json: max_dynamic_patch: expected 1 to {MOST_TILES}, found {most!r}"
        )
    return GotOcr2ImageProcessorPil(
        size={"height": height, "width": width},
        crop_to_patches=bool(config.get("dynamic_image_size", True)),
        min_patches=config.get("min_dynamic_patch", 1),
        max_patches=most,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def _shards(source: Path) -> list[Path]:
    """Return all weight files; without an index, every safetensors file, whatever its name."""
    if (source / INDEX).is_file():
        return index_shards(source / INDEX)
    return sorted(source.glob("*.safetensors")) or weight_files(source)


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
                        raise ModelError(
                            f"{name} is in {shard_of[native].name} and in {shard.name}; expected "
                            "it once: remove the shards that belong to another copy"
                        )
                    shard_of[native] = shard
                    if native in expected and part != expected[native]:
                        raise ModelError(
                            f"{shard}: {name}: expected shape {expected[native]} for {native} as "
                            f"config.json says, found {part}"
                        )
    missing = sorted(expected.keys() - shard_of.keys() - ({_HEAD} if tied else set()))
    unknown = sorted(shard_of.keys() - expected.keys())
    if missing or unknown:
        raise ModelError(
            "expected the tensors of the model that config.json describes; "
            f"missing: {listed(missing)}; left over: {listed(unknown)} (native names)"
        )


def _checked_parts(
    layout: Layout, shard: Path, name: str, shape: tuple[int, ...]
) -> list[tuple[str, tuple[int, ...]]]:
    try:
        names = layout.native_names(name)
    except ModelError as error:
        raise ModelError(f"{shard}: {error}") from error
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
                if not is_finite(whole):
                    raise ModelError(
                        f"{shard}: {name}: expected finite weights, found NaN or infinite values"
                    )
                parts = layout.native_tensors(name, whole)
                # safetensors refuses tensors that share memory, as the parts of one tensor do.
                parts = parts if len(parts) == 1 else tuple(part.clone() for part in parts)
                tensors |= zip(layout.native_names(name), parts, strict=True)
        if drop_head:
            head_and_embedding += [tensors[name] for name in (_HEAD, _EMBEDDING) if name in tensors]
            tensors.pop(_HEAD, None)
        target = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        target = target if len(shards) > 1 else SINGLE
        for name, value in tensors.items():
            where[name] = target
            size += value.nbytes
            parameters += value.numel()
            dtype = value.dtype
        contiguous = {name: value.contiguous() for name, value in tensors.items()}
        save_file(contiguous, directory / target, metadata={"format": "pt"})
    if len(head_and_embedding) == 2 and not torch.equal(*head_and_embedding):
        raise ModelError(
            "config.json says tie_word_embeddings, but the head is not the embedding; set it to "
            "false if the model was trained with a head of its own"
        )
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (directory / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return {"tensors": len(where), "parameters": parameters}, dtype
