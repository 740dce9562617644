"""The word-level tokenizer and the configuration of the tiny base model.

A cell and its equals sign are one token (``A1=``), so that reading a cell takes a single attention
step from that token to the picture. The chat template is ChatML, as for InternVL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recipes.embedded.sheets import CELLS, SHEET_PIXELS

SYSTEM_PROMPT = "judge each step of the solution"
ROW_ENDS = ("from the top", "from the bottom")
"""What a document of pretraining says of the end that it counts rows from, the first as in a
spreadsheet. The words are no part of the finished vocabulary: no prompt can name a convention."""
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>",
    "<img>", "</img>", "<IMG_CONTEXT>", "<video>",
)  # fmt: skip
_WORDS = (
    "+ - system user assistant judge each step of the solution ### Question: Solution Process: "
    "what is plus and ? gap between largest max = true false"
)


def vocabulary(more: Sequence[str] = ()) -> list[str]:
    """Return all tokens in the order of their ids, those of the phrases ``more`` last."""
    words = [*SPECIAL, *_WORDS.split(), *CELLS, *(f"{cell}=" for cell in CELLS)]
    words += [str(number) for number in range(60)]
    words += " ".join(more).split()
    return list(dict.fromkeys(words))


def build_tokenizer(more: Sequence[str] = ()) -> Any:
    """Return a word-level tokenizer, which splits at white space and has a token ``<unk>``.

    Args:
        more: Phrases whose words it knows too, with the last ids.
    """
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = vocabulary(more)
    core = Tokenizer(
        WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    core.pre_tokenizer = WhitespaceSplit()
    core.add_special_tokens(list(SPECIAL))
    core.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        padding_side="right",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def base_config(tower: tuple[int, int] = (96, 3), language: tuple[int, int] = (128, 5)) -> Any:
    """Return the configuration of an InternVL of 1.1 M parameters by default.

    Patches of 8 x 8 pixels and a pixel shuffle by 0.5 give one visual token per cell.

    Args:
        tower: The width and the number of layers of the vision tower.
        language: The width and the number of layers of the language model.
    """
    from transformers import InternVLConfig

    words = vocabulary()
    width, layers = tower
    hidden, depth = language
    return InternVLConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(words),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": depth,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": False,
            "pad_token_id": words.index("<|endoftext|>"),
            "bos_token_id": words.index("<|endoftext|>"),
            "eos_token_id": words.index("<|im_end|>"),
        },
        vision_config={
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "image_size": (SHEET_PIXELS, SHEET_PIXELS),
            "patch_size": (8, 8),
            "attention_bias": True,
            "layer_scale_init_value": 1.0,
            "use_mean_pooling": True,
        },
        image_token_id=words.index("<IMG_CONTEXT>"),
        image_seq_length=len(CELLS),
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )


def build_image_processor() -> Any:
    """Return InternVL's tiling image processor for tiles of a sheet's size."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
        GotOcr2ImageProcessorPil,
    )

    return GotOcr2ImageProcessorPil(
        size={"height": SHEET_PIXELS, "width": SHEET_PIXELS},
        crop_to_patches=True,
        min_patches=1,
        max_patches=12,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
