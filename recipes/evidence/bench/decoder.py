"""A small decoder of the Qwen2 kind that computes in the precision of its parameters.

It has RMSNorm, rotary positions, causal attention and gated SiLU. Qwen2 of transformers computes
its norms in float32 in every precision, so it has no float64 reference; this decoder has one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Sizes:
    """The sizes of model and data: a batch has ``examples`` sequences of ``tokens`` tokens."""

    layers: int = 4
    width: int = 256
    heads: int = 4
    hidden: int = 1024
    vocabulary: int = 2048
    examples: int = 4
    tokens: int = 256
    instances: int = 512


class _Block(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, self.heads = sizes.width, sizes.heads
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.hidden_norm = nn.RMSNorm(width, eps=1e-6)
        self.gate = nn.Linear(width, sizes.hidden, bias=False)
        self.up = nn.Linear(width, sizes.hidden, bias=False)
        self.down = nn.Linear(sizes.hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return x of shape [batch, tokens, width] after attention and gated hidden layer."""
        y = self.attention_norm(x)
        query, key, value = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        y = self.hidden_norm(x)
        hidden: Tensor = self.down(functional.silu(self.gate(y)) * self.up(y))
        return x + hidden


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


class Decoder(nn.Module):
    """Next-token logits [batch, tokens, vocabulary] of token ids [batch, tokens]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.blocks = nn.ModuleList(_Block(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.width, eps=1e-6)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=sizes.width**-0.5)
        # A plain attribute is not cast with the module, so it is exact in every precision.
        half = sizes.width // sizes.heads // 2
        rates = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        self.angles = torch.arange(sizes.tokens, dtype=torch.float64)[:, None] * rates

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits."""
        x = self.embedding(tokens)
        angles = self.angles[: tokens.shape[1]]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        return logits
