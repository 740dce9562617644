"""Checkpoints of InternVL as its authors' code writes them, tiny and random."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.prm.original_internvl import InternLM2, OriginalInternVL
from tests.prm.tiny import byte_tokenizer, qwen2_tokenizer

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "qkv_bias": True,
    "qk_normalization": False,
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "model_type": "intern_vit_6b",
    "drop_path_rate": 0.1,
    "use_flash_attn": True,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "_attn_implementation_autoset": True,
}


def make_original(kind: str, *, tied: bool = False) -> tuple[dict, OriginalInternVL, object]:
    """Original config, model in float64, tokenizer; every parameter random."""
    tokenizer = qwen2_tokenizer() if kind == "qwen2" else byte_tokenizer()
    text = {**TEXT, "model_type": kind, "vocab_size": len(tokenizer), "tie_word_embeddings": tied}
    rms = kind == "internlm2"  # and with it the vision tower of the 6B model
    vision = {**VISION, "qk_normalization": rms, "norm_type": "rms_norm" if rms else "layer_norm"}
    config = {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "llm_config": {**text, "bias": False} if kind == "internlm2" else text,
        "vision_config": vision,
        "force_image_size": 56,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "use_thumbnail": True,
        "dynamic_image_size": True,
        "max_dynamic_patch": 6,
    }
    torch.manual_seed(0)
    if kind == "qwen2":
        native = {name: value for name, value in text.items() if not name.startswith("_")}
        native.pop("torch_dtype")
        decoder = Qwen2ForCausalLM(Qwen2Config(**native))
    else:
        decoder = InternLM2(text)
    model = OriginalInternVL(config, decoder, tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"))
    model = model.double().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.3)
    return config, model, tokenizer


def write_original(folder: Path, config: dict, state: dict, tokenizer, shards: int = 1) -> Path:
    """Write a checkpoint folder; with several shards, parameters go round them in turn."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    names, where = sorted(state), {}
    for place in range(shards):
        part = {name: state[name].clone() for name in names[place::shards]}
        file = (
            "model.safetensors" if shards == 1 else f"model-{place + 1:05d}-of-{shards}.safetensors"
        )
        save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def state_of(model: OriginalInternVL, *, tied: bool = False) -> dict:
    """What a checkpoint saves: with tied embeddings, no output layer."""
    state = model.state_dict()
    if tied:
        del state["language_model.lm_head.weight"]
    return state
