from __future__ import annotations

import torch

from prm.batches.token_batches import token_batches, vision_tokens_per_tile
from tests.prm.tiny import internvl, qwen2_vl


def test_batches_of_tokens():
    lengths = torch.tensor([10, 30, 20, 30, 5, 5, 5]).numpy()

    def batches(*limits):
        return [batch.tolist() for batch in token_batches(lengths, *limits)]

    assert batches(3) == batches(3, 90) == [[1, 3, 2], [0, 4, 5], [6]]
    assert batches(100, 60) == [[1, 3], [2, 0, 4], [5, 6]]
    assert batches(100, 59) == [[1], [3], [2, 0], [4, 5, 6]]
    assert batches(100, 1) == [[row] for row in (1, 3, 2, 0, 4, 5, 6)]
    assert batches(2, 10**9) == [[1, 3], [2, 0], [4, 5], [6]]
    images = torch.tensor([0, 0, 0, 40, 0, 0, 0]).numpy()
    assert batches(100, 99, images)[0] == [1]
    assert batches(100, 100, images)[0] == [1, 3]
    assert token_batches(lengths[:0], 3) == token_batches(lengths[:0], 3, 5) == []


def test_tokens_of_a_tile_in_the_vision_tower():
    assert vision_tokens_per_tile(internvl().model.config) == 16
    assert vision_tokens_per_tile(qwen2_vl().model.config) == 4
    assert vision_tokens_per_tile(object()) == 0
