"""Tiny models whose own processors prepare images: fixed size, several crops, typed tokens."""

from __future__ import annotations

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from prm.models.model import PRM, make_prm
from tests.prm.tiny import byte_tokenizer, text_config

CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
    "projection_dim": 16,
}
CROPS = [[28, 56], [56, 28], [56, 56]]
SIZES = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
HOW = {"patch_size": 7, "vision_feature_select_strategy": "default"}
GEMMA_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<boi>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(
        {"extra_special_tokens": ["<image>", "<boi>", "<image_soft>", "<eoi>"]}
    )
    return tokenizer


def _llava_parts(tokenizer: PreTrainedTokenizerFast) -> dict:
    return {
        "vision_config": CLIP,
        "text_config": {"model_type": "llama", **text_config(tokenizer, False)},
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "vision_feature_layer": -1,
        "image_seq_length": 16,
        "tie_word_embeddings": False,
    }


def llava() -> PRM:
    """One square per image, 16 tokens."""
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(**_llava_parts(tokenizer))).double()
    images = CLIPImageProcessorPil(**SIZES)
    processor = LlavaProcessor(images, tokenizer, num_additional_image_tokens=1, **HOW)
    return make_prm(model, tokenizer, processor)


def llava_next() -> PRM:
    """A square and up to four crops per image, padded where images differ."""
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    config = LlavaNextConfig(**_llava_parts(tokenizer), image_grid_pinpoints=CROPS)
    model = LlavaNextForConditionalGeneration(config).double()
    images = LlavaNextImageProcessorPil(**SIZES, image_grid_pinpoints=CROPS)
    processor = LlavaNextProcessor(images, tokenizer, num_additional_image_tokens=1, **HOW)
    return make_prm(model, tokenizer, processor)


def gemma3() -> PRM:
    """Tokens of an image look at each other in both directions; a template of typed parts."""
    tokenizer = _tokenizer()
    names = {"boi_token": "<boi>", "image_token": "<image_soft>", "eoi_token": "<eoi>"}
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(text) for name, text in names.items()}
    for name, value in (names | ids).items():
        setattr(tokenizer, name, value)
    torch.manual_seed(0)
    layers = ["sliding_attention", "full_attention"]
    config = Gemma3Config(
        text_config={
            **text_config(tokenizer, True),
            "head_dim": 8,
            "sliding_window": 16,
            "layer_types": layers,
        },
        vision_config={
            key: CLIP[key] for key in CLIP if key not in ("model_type", "projection_dim")
        },
        mm_tokens_per_image=4,
        image_token_id=ids["image_token_id"],
        boi_token_id=ids["boi_token_id"],
        eoi_token_id=ids["eoi_token_id"],
    )
    model = Gemma3ForConditionalGeneration(config).double()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # the projector starts at zero
            torch.nn.init.normal_(parameter, std=0.3)
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    processor = Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=GEMMA_TEMPLATE)
    return make_prm(model, tokenizer, processor)
