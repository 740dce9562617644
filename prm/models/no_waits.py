"""What transformers reads of a device in a forward pass, known without reading.

Reading a value holds up the host until the device has done all that it was given. transformers does
so to see whether anything is padded, and whether there are as many image tokens as image features.
Both are known here: a causal model does not look at padding on the right, and the collator writes
the tokens of an image for the tiles that it has.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

_TAKE_MASKS_BY_LAYER = ("qwen2", "qwen3")
"""Types of language models that take a mask for each kind of layer, and then make none."""

_CAUSAL_WITHOUT_MASK = ("sdpa", "flash_attention_2")


def attention_mask(model: Any, mask: Tensor) -> Any:
    """Return what the base model of ``model`` is given as its attention mask.

    On the CPU, where nothing is read from a device, it is the mask. Elsewhere it is none for the
    attention that is causal without one: padding is on the right, so that no token that counts
    looks at it, and the kernels for causal attention are the fastest.

    Args:
        model: The model.
        mask: 1 for tokens, 0 for padding on their right, [batch, seq]; or what each token sees,
            [batch, 1, seq, seq], which is returned.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if (
        mask.is_cpu
        or mask.dim() == 4
        or config.model_type not in _TAKE_MASKS_BY_LAYER
        or config._attn_implementation not in _CAUSAL_WITHOUT_MASK
        or kinds != {"full_attention"}
    ):
        return mask
    return {"full_attention": None}


def count_image_tokens_on_cpu_only(model: Any, image_token_id: int) -> None:
    """Let InternVL find its image tokens on a device without counting them.

    A device itself refuses more tokens than features; fewer cannot come from a ``Collator``.

    Args:
        model: The base model; changed.
        image_token_id: The id of the tokens that image features take the place of.
    """

    def mask(input_ids: Tensor, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        found = input_ids == image_token_id
        if found.is_cpu and found.sum() * inputs_embeds.shape[-1] != image_features.numel():
            raise ValueError(
                f"Image features and image tokens do not match, tokens: {found.sum()}, features: "
                f"{image_features.shape[0] * image_features.shape[1]}"
            )
        return found.unsqueeze(-1)

    model.get_placeholder_mask = mask
