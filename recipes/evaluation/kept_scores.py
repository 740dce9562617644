"""Scores of the training set under the initial model, kept on disk: a second run reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prm.activations.fingerprint import execution_facts
from prm.models.model import PRM
from prm.tensor_cache import TensorCache, fingerprint_of
from recipes.models.loading import Examples
from recipes.options.base import ScoringOptions
from recipes.options.flat import flat_options
from recipes.options.train import TrainOptions
from recipes.terminal import say

NOT_SCORING = frozenset(
    {
        *("model", "image_root", "allow_outside_images"),  # their contents are compared
        *("device", "precision", "attention", "threads"),  # what they come to is compared
        *("on_bad_row", "max_bad_rows"),  # the lines that are used are compared
        *("aggregation", "seed", "workers"),
    }
)
"""Options of scoring by which step scores are not told apart."""

_KEY = "initial-scores"


def initial_score_cache(
    prm: PRM, data: Examples, options: TrainOptions, identity: Mapping[str, Any], folder: Path
) -> TensorCache:
    """Return where the step scores of the training set under the initial model are kept.

    The fingerprint is of the model's parameters and how it computes, of the training file and its
    pictures and the lines that are used of it, of the tokenizer, its template and the image
    processor, and of the options of scoring.

    Args:
        prm: The model; its parameters may have moved.
        data: The training set.
        options: The options of the run.
        identity: The identity of the run (``recipes.run.identity``), which holds the digests of the
            initial model, of the training file and of its pictures.
        folder: The folder of the cache.
    """
    scoring = [name for name in flat_options(ScoringOptions) if name not in NOT_SCORING]
    lines = hashlib.sha256(",".join(map(str, data.lines)).encode()).hexdigest()
    facts = {
        "model": identity["model"],
        "file": identity["files"]["train_file"],
        "pictures": identity["pictures"]["train_file"],
        "lines": lines,
        "tokenizer": prm.tokenizer.backend_tokenizer.to_str(),
        "templates": [
            str(getattr(part, "chat_template", None))
            for part in (prm.tokenizer, prm.image_processor)
        ],
        "image_processor": _processor(prm),
        "options": {name: getattr(options, name) for name in scoring},
    }
    return TensorCache(folder, fingerprint_of(facts | execution_facts(prm)), say)


def kept_scores(
    cache: TensorCache | None, score: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Return step scores and their mask, [examples, steps] each, from a cache or as ``score`` does.

    What is scored is put into the cache. With None there is no cache.

    Raises:
        OSError: The cache cannot be written.
    """
    found = None if cache is None else cache.get(_KEY)
    if found is not None:
        return found["scores"], found["mask"]
    scores, mask = score()
    if cache is not None:
        cache.put(_KEY, {"scores": scores, "mask": mask.to(torch.bool)})
    return scores, mask


def _processor(prm: PRM) -> str | None:
    return None if prm.image_processor is None else str(prm.image_processor.to_json_string())
