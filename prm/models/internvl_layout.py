"""How InternVL's original layout maps to that of transformers: names, tensors, configuration.

The original layout, that of ``OpenGVLab/InternVL3-1B`` and the checkpoints of DreamPRM-1.5 and
VisualPRM, runs only with code from the checkpoint. The layouts differ in names and in which tensors
are fused; the values are the same:

==============================  =====================================================
original                        native
==============================  =====================================================
``vision_model.*``              ``model.vision_tower.*``; q, k, v of ``attn.qkv`` apart
``mlp1.0``, ``mlp1.1``, ``.3``  ``model.multi_modal_projector``: norm and two linear layers
``language_model.model.*``      ``model.language_model.*``; InternLM2 becomes Llama
``language_model.lm_head``      ``lm_head``
==============================  =====================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prm.models.untrusted import ModelError

_TEXT_TYPES = ("qwen2", "qwen3", "llama", "internlm2")
_TOWER = "model.vision_tower."
_BLOCK = _TOWER + r"encoder.layer.\1."
_TEXT = "model.language_model."
_TEXT_BLOCK = _TEXT + r"layers.\1."


def _rules(prefix: str, *rules: tuple[str, str]) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(re.escape(prefix) + old), new) for old, new in rules)


_VISION = _rules(
    "vision_model.",
    (r"embeddings\.class_embedding", _TOWER + "embeddings.cls_token"),
    (r"embeddings\.position_embedding", _TOWER + "embeddings.position_embeddings"),
    (
        r"embeddings\.patch_embedding\.(weight|bias)",
        _TOWER + r"embeddings.patch_embeddings.projection.\1",
    ),
    (r"encoder\.layers\.(\d+)\.ls([12])", _BLOCK + r"lambda_\2"),
    (r"encoder\.layers\.(\d+)\.norm1\.(weight|bias)", _BLOCK + r"layernorm_before.\2"),
    (r"encoder\.layers\.(\d+)\.norm2\.(weight|bias)", _BLOCK + r"layernorm_after.\2"),
    (
        r"encoder\.layers\.(\d+)\.attn\.proj\.(weight|bias)",
        _BLOCK + r"attention.projection_layer.\2",
    ),
    (r"encoder\.layers\.(\d+)\.attn\.([qk]_norm\.weight)", _BLOCK + r"attention.\2"),
    (r"encoder\.layers\.(\d+)\.mlp\.(fc[12]\.(?:weight|bias))", _BLOCK + r"mlp.\2"),
)
_PROJECTOR = _rules(
    "mlp1.",
    (r"0\.(weight|bias)", r"model.multi_modal_projector.layer_norm.\1"),
    (r"1\.(weight|bias)", r"model.multi_modal_projector.linear_1.\1"),
    (r"3\.(weight|bias)", r"model.multi_modal_projector.linear_2.\1"),
)
_DECODER = _rules("language_model.", (r"model\.(.+)", _TEXT + r"\1"), (r"(lm_head\.weight)", r"\1"))
_INTERNLM2 = _rules(
    "language_model.",
    (r"model\.tok_embeddings\.weight", _TEXT + "embed_tokens.weight"),
    (r"model\.norm\.weight", _TEXT + "norm.weight"),
    (r"output\.weight", "lm_head.weight"),
    (r"model\.layers\.(\d+)\.attention_norm\.weight", _TEXT_BLOCK + "input_layernorm.weight"),
    (r"model\.layers\.(\d+)\.ffn_norm\.weight", _TEXT_BLOCK + "post_attention_layernorm.weight"),
    (r"model\.layers\.(\d+)\.attention\.wo\.(weight|bias)", _TEXT_BLOCK + r"self_attn.o_proj.\2"),
    (r"model\.layers\.(\d+)\.feed_forward\.w1\.weight", _TEXT_BLOCK + "mlp.gate_proj.weight"),
    (r"model\.layers\.(\d+)\.feed_forward\.w2\.weight", _TEXT_BLOCK + "mlp.down_proj.weight"),
    (r"model\.layers\.(\d+)\.feed_forward\.w3\.weight", _TEXT_BLOCK + "mlp.up_proj.weight"),
)
_FUSED_VISION = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.attn\.qkv\.(weight|bias)")
_FUSED_TEXT = re.compile(r"language_model\.model\.layers\.(\d+)\.attention\.wqkv\.(weight|bias)")
# The values that the original uses for entries that its vision_config lacks.
_VISION_DEFAULTS = {
    "num_channels": 3,
    "patch_size": 14,
    "image_size": 224,
    "qkv_bias": False,
    "hidden_size": 3200,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "qk_normalization": True,
    "num_hidden_layers": 48,
    "hidden_act": "gelu",
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
}
_VISION_RENAMED = {"qkv_bias": "attention_bias", "qk_normalization": "use_qk_norm"}
_NOT_ARCHITECTURE = frozenset(
    {
        *("_name_or_path", "_attn_implementation_autoset", "architectures", "auto_map"),
        *("attn_implementation", "dtype", "model_type", "torch_dtype", "transformers_version"),
        *("bias", "tie_word_embeddings", "use_cache"),
    }
)


@dataclass(frozen=True)
class Layout:
    """The names and the fused tensors of one original checkpoint.

    Attributes:
        text_type: The original's ``llm_config.model_type``.
        heads: The number of attention heads of the language model.
        key_value_heads: The number of its key-value heads.
    """

    text_type: str
    heads: int
    key_value_heads: int

    def native_names(self, name: str) -> tuple[str, ...]:
        """Return the native names for an original tensor: one, or those of q, k and v.

        Raises:
            ModelError: The original layout has no such name.
        """
        if match := _FUSED_VISION.fullmatch(name):
            block = match.expand(_BLOCK)
            return tuple(f"{block}attention.{side}_proj.{match[2]}" for side in "qkv")
        internlm2 = self.text_type == "internlm2"
        if internlm2 and (match := _FUSED_TEXT.fullmatch(name)):
            block = match.expand(_TEXT_BLOCK)
            return tuple(f"{block}self_attn.{side}_proj.{match[2]}" for side in "qkv")
        for pattern, native in (*_VISION, *_PROJECTOR, *(_INTERNLM2 if internlm2 else _DECODER)):
            if match := pattern.fullmatch(name):
                return (match.expand(native),)
        raise ModelError(
            f"expected a tensor of InternVL's original layout with a {self.text_type} language "
            f"model, found {name!r}"
        )

    def native_shapes(self, name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of ``native_tensors``, one per native name, from the shape alone.

        A number of rows that cannot be divided evenly is rounded up, so that it fits no model.
        """
        if _FUSED_VISION.fullmatch(name):
            return ((-(-shape[0] // 3), *shape[1:]),) * 3
        if self.text_type == "internlm2" and _FUSED_TEXT.fullmatch(name):
            size = -(-shape[0] // (self.heads + 2 * self.key_value_heads))
            rows = (self.heads * size, *[self.key_value_heads * size] * 2)
            return tuple((count, *shape[1:]) for count in rows)
        return (shape,)

    def native_tensors(self, name: str, value: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of ``native_names``, with a fused projection split into q, k and v.

        The vision tower stacks [q; k; v]. InternLM2 stacks, for every key-value head, its group of
        query heads, then its key, then its value.
        """
        if _FUSED_VISION.fullmatch(name):
            return value.chunk(3)
        if self.text_type == "internlm2" and _FUSED_TEXT.fullmatch(name):
            group = self.heads // self.key_value_heads
            rest = value.shape[1:]
            heads = value.reshape(self.key_value_heads, group + 2, -1, *rest)
            parts = (heads[:, :group], heads[:, group], heads[:, group + 1])
            return tuple(part.reshape(-1, *rest) for part in parts)
        return (value,)


def layout_of(config: Mapping[str, Any]) -> Layout:
    """Return the layout of the checkpoint with this original ``config.json``.

    Raises:
        ModelError: The native classes do not cover this variant.
    """
    text = config.get("llm_config") or {}
    wanted = (
        ("model_type", ("internvl_chat",), config.get("model_type")),
        ("llm_config.model_type", _TEXT_TYPES, text.get("model_type")),
        ("ps_version", ("v2",), config.get("ps_version", "v1")),
        ("pad2square", (False,), config.get("pad2square", False)),
        ("use_thumbnail", (True,), config.get("use_thumbnail", False)),
        ("template", ("internvl2_5",), config.get("template")),
    )
    for name, known, value in wanted:
        if value not in known:
            raise ModelError(
                f"config.json: expected {name} {' or '.join(map(repr, known))}, found {value!r}; "
                "it is not InternVL in its original layout, or a variant that transformers has no "
                "class for"
            )
    heads = text["num_attention_heads"]
    return Layout(text["model_type"], heads, text.get("num_key_value_heads") or heads)


def is_tied(config: Mapping[str, Any]) -> bool:
    """Return whether the head of the language model shares its embedding's weights."""
    return bool(config["llm_config"].get("tie_word_embeddings", False))


def native_config(config: Mapping[str, Any], image_token_id: int) -> Any:
    """Return the native configuration that belongs to an original ``config.json``.

    Args:
        config: The original's configuration, which ``layout_of`` has checked.
        image_token_id: The id of the token ``<IMG_CONTEXT>``.

    Raises:
        ModelError: The entries for the size of images contradict each other.
    """
    from transformers import InternVLConfig

    text = config["llm_config"]
    vision = {**_VISION_DEFAULTS, **config["vision_config"]}
    size = config.get("force_image_size") or vision["image_size"]
    if size != vision["image_size"]:
        raise ModelError(
            f"config.json: expected force_image_size {vision['image_size']} as in vision_config, "
            f"found {size}; the position embeddings would have to be resized"
        )
    kept = {_VISION_RENAMED.get(name, name): vision[name] for name in _VISION_DEFAULTS}
    ratio = config.get("downsample_ratio", 0.5)
    return InternVLConfig(
        text_config=_text_config(text),
        vision_config={**kept, "image_size": [size, size], "use_mean_pooling": True},
        image_token_id=image_token_id,
        image_seq_length=int((size // vision["patch_size"]) ** 2 * ratio**2),
        downsample_ratio=ratio,
        vision_feature_layer=config.get("select_layer", -1),
        tie_word_embeddings=is_tied(config),
        architectures=["InternVLForConditionalGeneration"],
    )


def _text_config(text: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in text.items() if name not in _NOT_ARCHITECTURE}
    kept["tie_word_embeddings"] = bool(text.get("tie_word_embeddings", False))
    if text["model_type"] != "internlm2":
        return {"model_type": text["model_type"], **kept}
    if text.get("bias", True):
        kept |= {"attention_bias": True}
    return {"model_type": "llama", **kept}
