"""Tiny random-weight models, their tokenizers and image processor, built in code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from prm.model import PRM, make_prm
from prm.schema import Step, StepExample

# torch itself scripts its decompositions when forward mode is first used.
FORWARD_MODE = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>",
    "<img>", "</img>", "<IMG_CONTEXT>", "<video>",
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


def _text_config(tokenizer: PreTrainedTokenizerFast, tied: bool) -> dict:
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
        text_config={"model_type": "qwen2", **_text_config(tokenizer, tied)},
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
) -> PRM:
    """A text-only model."""
    tokenizer = tokenizer or word_tokenizer()
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**_text_config(tokenizer, tied))).to(dtype)
    return make_prm(model, tokenizer)


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
