"""InternVL3-1B's architecture at a share of its size, random weights, and batches of its shape.

What a step costs does not depend on the weights. The vocabulary is the real one, since its two
matrices are most of a small model, and the full-sequence logits most of the original's memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import OptimizerState, tree
from prm.aggregations import AGGREGATIONS
from prm.inputs.collate import Batch
from prm.models.model import PRM, split_parameters
from recipes.method.objective import Objective
from weighting import Clip, InstanceTable

PLUS_ID, MINUS_ID = 10, 12
IMAGE_TOKEN_ID = 151_667
INSTANCES = 64  # rows of the table


@dataclass(frozen=True)
class Shape:
    """The sizes of a model and of a sequence; the defaults are those of InternVL3-1B.

    Attributes:
        name: For the table.
        layers: Of the language model and of the vision tower, each.
        hidden: Width of the language model, with heads of an 14th of it, two of them for keys.
        intermediate: Width of its feed-forward part.
        tower: Width of the vision tower, with 16 heads and a feed-forward part four times as wide.
        vocabulary: Rows of the embedding and of the head, which are not tied.
        image: Pixels along a tile's edge; patches have 14.
        tiles: Tiles of an image.
        text: Tokens beside those of the image.
        steps: Label positions.
    """

    name: str
    layers: int = 24
    hidden: int = 896
    intermediate: int = 4864
    tower: int = 1024
    vocabulary: int = 151_674
    image: int = 448
    tiles: int = 1
    text: int = 441
    steps: int = 5

    @property
    def image_tokens(self) -> int:
        """Tokens of an image: for each tile a quarter of its patches."""
        return self.tiles * (self.image // 28) ** 2

    @property
    def tokens(self) -> int:
        """Tokens of a sequence."""
        return self.image_tokens + self.text


SHAPES = {
    "tiny": Shape("tiny", 1, 56, 32, 32, vocabulary=300, image=56, text=40, steps=3),
    "quarter": Shape("quarter width, 6 + 6 layers", 6, 224, 1216, 256),
    "published": Shape("published widths, 2 + 2 layers", 2),
    "full": Shape("InternVL3-1B"),
}


@dataclass(frozen=True)
class Race:
    """One θ with moments, which every contender changes in place, and the batches of a step.

    Attributes:
        shape: Of the model.
        objective: The losses.
        params: θ by name, the model's own memory.
        state: The moments of AdamW.
        weights: φ, one row per instance.
    """

    shape: Shape
    objective: Objective
    params: dict[str, Tensor]
    state: OptimizerState
    weights: dict[str, Tensor]

    @property
    def parameter_bytes(self) -> int:
        """The size of θ."""
        return sum(leaf.nbytes for leaf in self.params.values())

    @property
    def held_bytes(self) -> int:
        """The size of θ and its moments, which every contender holds."""
        moments = sum(leaf.nbytes for leaf in tree.leaves(self.state[1:]))
        return self.parameter_bytes + moments

    def batch(self, size: int, seed: int) -> Batch:
        """Return a batch with the fields of both levels, on θ's device."""
        shape, draw = self.shape, torch.Generator().manual_seed(seed)
        param = next(iter(self.params.values()))
        ids = torch.randint(
            100, min(shape.vocabulary - 1, 150_000), (size, shape.tokens), generator=draw
        )
        ids[:, 20 : 20 + shape.image_tokens] = image_token_id(shape)
        positions = torch.linspace(shape.tokens - shape.text // 2, shape.tokens - 1, shape.steps)
        pixels = torch.randn(size * shape.tiles, 3, shape.image, shape.image, generator=draw)
        fields = {
            "input_ids": ids,
            "pixel_values": pixels.to(param.dtype),
            "num_patches": torch.full((size,), shape.tiles),
            "label_positions": positions.long().expand(size, -1),
            "step_mask": torch.ones(size, shape.steps, dtype=torch.bool),
            "labels": torch.randint(2, (size, shape.steps), generator=draw).float(),
            "correct": torch.randint(2, (size,), generator=draw).float(),
            "index": torch.randint(INSTANCES, (size,), generator=draw),
        }
        return {name: field.to(param.device) for name, field in fields.items()}


def image_token_id(shape: Shape) -> int:
    """Return the id of the token that stands for a part of the image."""
    return min(IMAGE_TOKEN_ID, shape.vocabulary - 1)


def internvl_config(shape: Shape) -> Any:
    """Return the transformers configuration of a shape."""
    from transformers import InternVLConfig

    return InternVLConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
        },
        vision_config={
            "hidden_size": shape.tower,
            "intermediate_size": 4 * shape.tower,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": 16,
            "image_size": (shape.image, shape.image),
            "patch_size": (14, 14),
            "attention_bias": True,
            "use_mean_pooling": True,
        },
        image_token_id=image_token_id(shape),
        image_seq_length=shape.image_tokens // shape.tiles,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )


def make_race(shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu") -> Race:
    """Return a model with random weights, cold moments, and weights that are not all 1.

    It is drawn on the device itself.
    """
    from transformers import InternVLForConditionalGeneration

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(0)
            model = InternVLForConditionalGeneration(internvl_config(shape))
    finally:
        torch.set_default_dtype(before)
    model.eval().requires_grad_(False)
    prm = PRM(model, None, None, None, PLUS_ID, MINUS_ID)
    table = InstanceTable(INSTANCES, bound=Clip(-1.0, 3.0), normalise="none")
    objective = Objective(prm, AGGREGATIONS["mean"], "both", table, full_vocab=True)
    params, _ = split_parameters(model)
    zeros = (tree.zeros_like(params) for _ in range(2))
    return Race(
        shape,
        objective,
        params,
        OptimizerState(torch.zeros((), dtype=torch.int64), *zeros),
        {"deviation": torch.linspace(-0.5, 0.5, INSTANCES, device=device)},
    )
