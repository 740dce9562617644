"""A scorer of a tiny model with random weights, which the tests of all callers share."""

from __future__ import annotations

import pytest
import torch

from prm.rewards.scorer import Scorer
from tests.prm.tiny import internvl, save_image, told


@pytest.fixture(scope="session")
def scorer() -> Scorer:
    """It judges at most 100 tokens, and cuts what is longer."""
    prm = internvl(dtype=torch.float32)
    prm.model.config.get_text_config().max_position_embeddings = 100
    return Scorer(told(prm), too_long="truncate")


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    return save_image(tmp_path_factory.mktemp("pictures") / "wide.png", 60, 60, seed=1)
