"""A task of a few digit sheets that trains in seconds, for tests that need whole runs.

The model is a random InternVL, and its accuracy has no meaning. ``make chaos`` and the tests train
it.
"""

from __future__ import annotations

from pathlib import Path

from recipes.embedded.build import Sizes, build
from recipes.embedded.vocabulary import base_config, build_image_processor, build_tokenizer

SIZES = Sizes(
    train_questions=9,
    train_solutions=2,
    cold_questions=4,
    meta_questions=6,
    meta_solutions=2,
    dev_questions=2,
    test_questions=5,
    candidates=4,
)


def write_tiny(data: Path, model: Path) -> None:
    """Write the data set and the model unless they exist."""
    if not data.exists():
        build(data, seed=1, sizes=SIZES)
    if not model.exists():
        import torch
        from transformers import InternVLForConditionalGeneration

        torch.manual_seed(0)
        config = base_config(tower=(16, 1), language=(32, 1))
        InternVLForConditionalGeneration(config).save_pretrained(model)
        build_tokenizer().save_pretrained(model)
        build_image_processor().save_pretrained(model)
