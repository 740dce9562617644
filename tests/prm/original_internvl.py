"""InternVL in its original layout, written anew: names, fused projections and forward pass.

A second implementation to compare converted checkpoints with: it shares no table of names with
``prm.models.internvl_layout``, and of transformers only the Qwen2 decoder, as the original does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=True)
        self.proj = nn.Linear(width, width)
        if qk_norm:
            self.q_norm, self.k_norm = RMSNorm(width), RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, width = x.shape
        qkv = self.qkv(x).reshape(batch, seq, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [batch, heads, seq, head]
        if hasattr(self, "q_norm"):
            q, k = (
                norm(part.transpose(1, 2).flatten(2))
                .view(batch, seq, *q.shape[1::2])
                .transpose(1, 2)
                for norm, part in ((self.q_norm, q), (self.k_norm, k))
            )
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, seq, width))


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        single = x.float()  # the original's norms compute in float32, whatever they are given
        scaled = single * torch.rsqrt(single.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * scaled.to(x.dtype)


class VisionMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class VisionLayer(nn.Module):
    def __init__(self, width: int, inner: int, heads: int, rms: bool) -> None:
        super().__init__()
        self.attn = Attention(width, heads, rms)
        self.mlp = VisionMLP(width, inner)
        norm = RMSNorm if rms else lambda size: nn.LayerNorm(size, eps=1e-6)
        self.norm1, self.norm2 = norm(width), norm(width)
        self.ls1 = nn.Parameter(torch.rand(width))
        self.ls2 = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x)) * self.ls1
        return x + self.mlp(self.norm2(x)) * self.ls2


class VisionEmbeddings(nn.Module):
    def __init__(self, width: int, patches: int, patch: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, patch, patch)
        self.position_embedding = nn.Parameter(torch.randn(1, patches + 1, width))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), -1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding


class VisionModel(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        width, side = config["hidden_size"], config["image_size"] // config["patch_size"]
        self.embeddings = VisionEmbeddings(width, side**2, config["patch_size"])
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            VisionLayer(
                width,
                config["intermediate_size"],
                config["num_attention_heads"],
                config["norm_type"] == "rms_norm",
            )
            for _ in range(config["num_hidden_layers"])
        )

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embeddings(pixels)
        for layer in self.encoder.layers:
            x = layer(x)
        return x


def pixel_shuffle(x: Tensor, scale: float) -> Tensor:
    """Version 2: [tiles, width, height, channels] to fewer, wider tokens; each axis in its place.

    Token (i, j) of the result holds the 2 x 2 patches from (2i, 2j) on, row by row.
    """
    block = int(1 / scale)
    tiles, rows, columns, _ = x.shape
    made = [
        torch.cat([x[:, i + a, j + b] for a in range(block) for b in range(block)], dim=-1)
        for i in range(0, rows, block)
        for j in range(0, columns, block)
    ]
    return torch.stack(made, dim=1).view(tiles, rows // block, columns // block, -1)


class InternLM2(nn.Module):
    """Its own names: ``wqkv`` holds, group by group, the queries, the key, the value."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.config = config
        width, inner = config["hidden_size"], config["intermediate_size"]
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        head = width // heads
        self.model = nn.Module()
        self.model.tok_embeddings = nn.Embedding(config["vocab_size"], width)
        self.model.norm = RMSNorm(width)
        self.model.layers = nn.ModuleList()
        for _ in range(config["num_hidden_layers"]):
            layer = nn.Module()
            layer.attention_norm, layer.ffn_norm = RMSNorm(width), RMSNorm(width)
            layer.attention, layer.feed_forward = nn.Module(), nn.Module()
            layer.attention.wqkv = nn.Linear(width, (heads + 2 * groups) * head, bias=False)
            layer.attention.wo = nn.Linear(width, width, bias=False)
            layer.feed_forward.w1 = nn.Linear(width, inner, bias=False)
            layer.feed_forward.w3 = nn.Linear(width, inner, bias=False)
            layer.feed_forward.w2 = nn.Linear(inner, width, bias=False)
            self.model.layers.append(layer)
        self.output = nn.Linear(width, config["vocab_size"], bias=False)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.tok_embeddings

    def logits(self, x: Tensor) -> Tensor:
        for layer in self.model.layers:
            x = x + self._attend(layer.attention, layer.attention_norm(x))
            y, mlp = layer.ffn_norm(x), layer.feed_forward
            x = x + mlp.w2(silu(mlp.w1(y)) * mlp.w3(y))
        return self.output(self.model.norm(x))

    def _attend(self, attention: nn.Module, x: Tensor) -> Tensor:
        batch, seq, width = x.shape
        heads = self.config["num_attention_heads"]
        groups, head = self.config["num_key_value_heads"], width // heads
        fused = attention.wqkv(x).view(batch, seq, groups, heads // groups + 2, head)
        queries = self._rotate(fused[..., :-2, :].reshape(batch, seq, heads, head))
        keys = self._rotate(fused[..., -2, :]).repeat_interleave(heads // groups, dim=2)
        values = fused[..., -1, :].repeat_interleave(heads // groups, dim=2)
        q, k, v = (part.transpose(1, 2) for part in (queries, keys, values))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        return attention.wo(mixed.transpose(1, 2).reshape(batch, seq, width))

    def _rotate(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        # In float32, as both sides keep their frequencies.
        powers = torch.arange(0, 2 * half, 2, dtype=torch.int64).float() / (2 * half)
        frequencies = 1.0 / self.config["rope_theta"] ** powers
        angles = (torch.arange(x.shape[1]).float()[:, None] * frequencies)[None, :, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class OriginalInternVL(nn.Module):
    """``InternVLChatModel``: vision model, ``mlp1``, language model."""

    def __init__(self, config: dict, language_model: nn.Module, image_token_id: int) -> None:
        super().__init__()
        self.image_token_id = image_token_id
        vision, width = config["vision_config"], config["llm_config"]["hidden_size"]
        self.scale = config["downsample_ratio"]
        wide = int(vision["hidden_size"] / self.scale**2)
        self.vision_model = VisionModel(vision)
        self.language_model = language_model
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(wide), nn.Linear(wide, width), nn.GELU(), nn.Linear(width, width)
        )

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        tokens = self.vision_model(pixel_values)[:, 1:]
        side = int(tokens.shape[1] ** 0.5)
        shuffled = pixel_shuffle(tokens.view(len(tokens), side, side, -1), self.scale)
        images = self.mlp1(shuffled.flatten(1, 2))
        embeddings = self.language_model.get_input_embeddings()(input_ids)
        embeddings = embeddings.clone()
        embeddings[input_ids == self.image_token_id] = images.flatten(0, 1)
        if isinstance(self.language_model, InternLM2):
            return self.language_model.logits(embeddings)
        return self.language_model(inputs_embeds=embeddings).logits
