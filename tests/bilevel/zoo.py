"""Small float64 reweighting problems, one per kind of layer, with all that a step needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from bilevel import ReweightingProblem

BATCH = 5


@dataclass(frozen=True)
class Case:
    problem: ReweightingProblem
    params: dict[str, Tensor]
    upper_params: dict[str, Tensor]
    batch: dict[str, Any]
    upper_batch: dict[str, Any]


def table_weights(upper: dict, batch: dict, features: Any) -> Tensor:
    """Weights from a table, one of them exactly 0: the last."""
    return (upper["table"] * upper["scale"])[batch["index"]]


def table(weights: list[float] | None = None) -> dict[str, Tensor]:
    weights = [0.4, 1.7, 1.0, 0.9, 0.0] if weights is None else weights
    return {
        "table": torch.tensor(weights, dtype=torch.float64),
        "scale": torch.tensor(1.3, dtype=torch.float64),
    }


class MLP(nn.Module):
    """Linear layers, a ReLU in place, a bare scale and shift, and a parameter that is not used."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.ReLU(inplace=True)
        )
        self.gain = nn.Parameter(torch.ones(5))
        self.shift = nn.Parameter(torch.zeros(1, 5))
        self.temperature = nn.Parameter(torch.tensor(0.3))
        self.head = nn.Linear(5, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        x = self.shift - self.gain * self.layers(x)
        return self.head(x) * (1.0 + self.temperature)


class RMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Attention(nn.Module):
    """Causal attention and a gated feed-forward, RMSNorm and SiLU, as in Qwen2; dropout."""

    def __init__(self, size=8, heads=2, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.before, self.after = RMSNorm(size), nn.RMSNorm(size, eps=1e-6)
        self.q, self.k, self.v = (nn.Linear(size, size) for _ in range(3))
        self.o = nn.Linear(size, size, bias=False)
        self.gate, self.up = (nn.Linear(size, 12, bias=False) for _ in range(2))
        self.down = nn.Linear(12, size, bias=False)

    def forward(self, x):
        batch, steps, size = x.shape
        normed = self.before(x)
        q, k, v = (
            layer(normed).view(batch, steps, self.heads, -1).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, steps, size))
        x = functional.dropout(x, self.dropout, self.training)
        normed = self.after(x)
        return x + self.down(functional.silu(self.gate(normed)) * self.up(normed))


class Language(nn.Module):
    """Token embedding, attention, an output layer that may be tied to the embedding."""

    def __init__(self, tied=False, dropout=0.0):
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.block = Attention(dropout=dropout)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.block(self.embed(tokens)))[:, -1]


class Encoder(nn.Module):
    """Post-LayerNorm and GELU, positions by look-up, GPT-2's transposed linear layer."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 6), nn.Embedding(9, 6)
        self.types = nn.Parameter(torch.randn(2, 6))
        self.first, self.norm = nn.Linear(6, 10), nn.LayerNorm(6)
        self.weight, self.bias = nn.Parameter(torch.randn(10, 6) / 3), nn.Parameter(torch.zeros(6))
        self.out = nn.Parameter(torch.randn(6, 3))

    def forward(self, tokens):
        steps = tokens.shape[1]
        x = self.tokens(tokens) + self.positions(torch.arange(steps)) + self.types[0]
        hidden = functional.gelu(self.first(x))
        flat = hidden.reshape(-1, hidden.shape[-1])
        x = x + torch.addmm(self.bias, flat, self.weight).view(x.shape)
        return self.norm(x).mean(1) @ self.out


class Vision(nn.Module):
    """Patch convolution, class token, position parameter, layer scale; then 1-d convolutions."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(2, 6, 2, stride=2)
        self.cls = nn.Parameter(torch.randn(1, 1, 6))
        self.position = nn.Parameter(torch.randn(1, 5, 6))
        self.scale = nn.Parameter(0.3 * torch.ones(6))
        self.mix = nn.Linear(6, 6)
        self.conv = nn.Conv1d(6, 4, 3, padding="same", groups=2, bias=False)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, images):
        patches = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(images), -1, -1), patches], dim=1) + self.position
        x = x + self.scale * torch.tanh(self.mix(x))
        return self.head(torch.tanh(self.norm(self.conv(x.transpose(1, 2)))).mean(2))


class Tiles(nn.Module):
    """A different number of tiles per example, encoded on their own and summed per example."""

    def __init__(self):
        super().__init__()
        self.encode, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, tiles, owner):
        encoded = self.norm(torch.tanh(self.encode(tiles)))
        pooled = encoded.new_zeros(int(owner.max()) + 1, 6).index_add(0, owner, encoded)
        return self.head(pooled)


def make(
    module: nn.Module,
    inputs: Callable[[int], dict[str, Tensor]],
    *,
    classes: int = 3,
    rows: Callable[[dict], dict[int, Tensor]] | None = None,
    frozen: Callable[[str], bool] = lambda name: False,
    weights: Callable[..., Tensor] = table_weights,
    dtype: torch.dtype = torch.float64,
) -> Case:
    module = module.to(dtype).train()
    everything = {name: leaf.detach().clone() for name, leaf in module.named_parameters()}
    params = {name: leaf for name, leaf in everything.items() if not frozen(name)}
    held = {name: leaf for name, leaf in everything.items() if frozen(name)}

    def batch(size: int) -> dict[str, Any]:
        return {
            "inputs": inputs(size),
            "labels": torch.randint(classes, (size,)),
            "index": torch.arange(size) % BATCH,
        }

    def per_example_loss(lower: dict, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        logits = functional_call(module, {**held, **lower}, kwargs=batch["inputs"])
        losses = functional.cross_entropy(logits, batch["labels"], reduction="none")
        return losses, {"losses": losses}

    def upper_loss(lower: dict, upper: dict, batch: dict) -> Tensor:
        losses, _ = per_example_loss(lower, batch)
        return losses.mean() + 0.01 * upper["table"].square().sum()

    return Case(
        ReweightingProblem(per_example_loss, weights, upper_loss, rows=rows),
        params,
        {name: leaf.to(dtype) for name, leaf in table().items()},
        batch(BATCH),
        batch(4),
    )


def vectors(size: int) -> dict[str, Tensor]:
    return {"x": torch.randn(size, 4, dtype=torch.float64)}


def tokens(size: int) -> dict[str, Tensor]:
    return {"tokens": torch.randint(1, 11, (size, 7))}


def images(size: int) -> dict[str, Tensor]:
    return {"images": torch.randn(size, 2, 4, 4, dtype=torch.float64)}


def tiles(size: int) -> dict[str, Tensor]:
    owner = torch.arange(size).repeat_interleave(torch.arange(size) % 3 + 1)
    return {"tiles": torch.randn(len(owner), 4, dtype=torch.float64), "owner": owner}


def flat_tokens(batch: dict) -> dict[int, Tensor]:
    size, steps = batch["inputs"]["tokens"].shape
    return {size * steps: torch.arange(size).repeat_interleave(steps)}


CASES: dict[str, Callable[[], Case]] = {
    "mlp": lambda: make(MLP(), vectors),
    "attention": lambda: make(Language(), tokens, classes=11),
    "tied": lambda: make(Language(tied=True), tokens, classes=11),
    "frozen": lambda: make(
        Language(), tokens, classes=11, frozen=lambda name: "embed" in name or "block.k" in name
    ),
    "dropout": lambda: make(Language(dropout=0.4), tokens, classes=11),
    "encoder": lambda: make(Encoder(), tokens, rows=flat_tokens),
    "vision": lambda: make(Vision(), images),
    "tiles": lambda: make(
        Tiles(), tiles, rows=lambda b: {len(b["inputs"]["owner"]): b["inputs"]["owner"]}
    ),
}


def build(name: str) -> Case:
    torch.manual_seed(3)
    return CASES[name]()
