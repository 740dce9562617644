"""Tiny random-weight models, their tokenizers and image processor, built in code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MethodType

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from prm.conventions import Conventions
from prm.models.model import PRM, make_prm
from prm.schema import Step, StepExample

# torch itself scripts its decompositions when forward mode is first used.
FORWARD_MODE = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>",
    "<img>", "</img>", "<IMG_CONTEXT>", "<video>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
WORDS = [
    "+", "-", "system", "user", "assistant", "judge", "each", "step", "###", "Question:",
    "Solution", "Process:", "what", "is", "one", "two", "three", "four", "five", "plus",
]  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM = "judge each step"
TILE = 56
_NAMED = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def word_tokenizer(
    template: str | None = CHAT_TEMPLATE, words: Sequence[str] = WORDS
) -> PreTrainedTokenizerFast:
    """One token per word; white space vanishes."""
    vocabulary = {word: place for place, word in enumerate([*SPECIAL, *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _finish(core, template)


def byte_tokenizer(template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte, white space included: other positions, no unknown words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: place for place, word in enumerate([*SPECIAL, *alphabet])}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _finish(core, template)


def qwen2_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's own class, one token per byte: what transformers loads for a qwen2 model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: place for place, word in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"extra_special_tokens": SPECIAL})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _finish(core: Tokenizer, template: str | None) -> PreTrainedTokenizerFast:
    core.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        extra_special_tokens=_NAMED,
    )
    tokenizer.chat_template = template
    return tokenizer


def image_processor() -> GotOcr2ImageProcessorPil:
    """As InternVL checkpoints store it: ``crop_to_patches`` off."""
    return GotOcr2ImageProcessorPil(
        size={"height": TILE, "width": TILE},
        crop_to_patches=False,
        min_patches=1,
        max_patches=12,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def text_config(tokenizer: PreTrainedTokenizerFast, tied: bool) -> dict:
    """Of a decoder with two layers of 32 units."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def internvl(
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float64,
    attention: str = "sdpa",
) -> PRM:
    """The tiny twin of InternVL3: 4 x 4 patches, 4 image tokens per tile."""
    tokenizer = tokenizer or word_tokenizer()
    torch.manual_seed(0)
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **text_config(tokenizer, tied)},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": (TILE, TILE),
            "patch_size": (14, 14),
            "attention_bias": True,
            "use_mean_pooling": True,
            "initializer_range": 0.3,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=tied,
        attn_implementation=attention,
    )
    model = InternVLForConditionalGeneration(config).to(dtype)
    return make_prm(model, tokenizer, image_processor())


def qwen(
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float64,
    attention: str = "sdpa",
) -> PRM:
    """A text-only model."""
    tokenizer = tokenizer or word_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(**text_config(tokenizer, tied), attn_implementation=attention)
    return make_prm(Qwen2ForCausalLM(config).to(dtype), tokenizer)


def llama(
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    attention: str = "sdpa",
) -> PRM:
    """Another text-only model."""
    tokenizer = tokenizer or word_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(**text_config(tokenizer, False), attn_implementation=attention)
    return make_prm(LlamaForCausalLM(config).to(dtype), tokenizer)


def patch_processor() -> Qwen2VLImageProcessorPil:
    """Patches of 4 x 4 pixels, 8 x 8 pixels per token; at most 32 tokens per image."""
    return Qwen2VLImageProcessorPil(
        patch_size=4,
        temporal_patch_size=2,
        merge_size=2,
        size={"shortest_edge": 64, "longest_edge": 32 * 64},
    )


def _vision_language_config(tokenizer: PreTrainedTokenizerFast, vision: dict) -> dict:
    ids = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {
        "text_config": {
            **text_config(tokenizer, False),
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1],
            },
        },
        "vision_config": {
            "depth": 2,
            "num_heads": 2,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "in_channels": 3,
            "initializer_range": 0.3,
            **vision,
        },
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()},
        "tie_word_embeddings": False,
    }  # fmt: skip


def qwen2_vl(
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    attention: str = "sdpa",
) -> PRM:
    """The tiny twin of Qwen2-VL."""
    tokenizer = tokenizer or word_tokenizer()
    torch.manual_seed(0)
    parts = _vision_language_config(
        tokenizer, {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2, "in_chans": 3}
    )
    config = Qwen2VLConfig(**parts, attn_implementation=attention)
    return make_prm(Qwen2VLForConditionalGeneration(config).to(dtype), tokenizer, patch_processor())


def qwen2_5_vl(
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    attention: str = "sdpa",
) -> PRM:
    """The tiny twin of Qwen2.5-VL: windows of 2 x 2 tokens, full attention in the second block."""
    tokenizer = tokenizer or word_tokenizer()
    torch.manual_seed(0)
    parts = _vision_language_config(
        tokenizer,
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    )
    config = Qwen2_5_VLConfig(**parts, attn_implementation=attention)
    model = Qwen2_5_VLForConditionalGeneration(config).to(dtype)
    return make_prm(model, tokenizer, patch_processor())


def told(prm: PRM) -> PRM:
    """The model with conventions of its own, none of them the library's default."""
    own = Conventions(
        plus_id=prm.plus_id,
        minus_id=prm.minus_id,
        system_prompt=SYSTEM,
        max_patches=3,
        aggregation="min",
    )
    return replace(prm, conventions=own)


def in_float64(prm: PRM, patch: pytest.MonkeyPatch) -> PRM:
    """Have norms and rotations compute in the precision of the model, not always in float32."""

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        size = hidden.square().mean(-1, keepdim=True)
        return self.weight * (hidden * torch.rsqrt(size + self.variance_epsilon))

    def rotate(q, k, cos, sin):
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        return tuple(x * cos + modeling_qwen2_vl.rotate_half(x) * sin for x in (q, k))

    for module in prm.model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            patch.setattr(module, "forward", MethodType(norm, module))
    for module in (modeling_qwen2_vl, modeling_qwen2_5_vl):
        patch.setattr(module, "apply_rotary_pos_emb_vision", rotate)
    return prm


def parameters(prm: PRM) -> dict[str, torch.Tensor]:
    """All parameters, as leaves that require gradients."""
    return {
        name: value.detach().clone().requires_grad_()
        for name, value in prm.model.named_parameters()
    }


def save_image(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """A random picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def example(
    name: str = "a",
    steps: int = 3,
    images: tuple[Path, ...] = (),
    labels: tuple[float | None, ...] | None = None,
    **more,
) -> StepExample:
    """An example whose steps differ from each other."""
    words = ["one", "two", "three", "four", "five"]
    labels = labels if labels is not None else (1.0, 0.0, None, 0.25, 1.0)[:steps]
    texts = [
        " ".join([words[place % 5], "plus", *words[: 1 + place % 3]]) for place in range(steps)
    ]
    return StepExample(
        id=name,
        question="what is two plus three",
        images=images,
        steps=tuple(map(Step, texts, labels)),
        **more,
    )
