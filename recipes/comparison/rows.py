"""The rows of the comparison as data: what each trains on, from which model, with which options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from recipes.embedded.build import Sizes
from recipes.embedded.sources import Mixture
from weighting import balanced_information, keep_best

_KEPT_WEIGHT = 0.5  # An instance with a higher weight counts as kept.

Entries = Sequence[Mapping[str, Any]]
"""Rows of a run's ``weights.jsonl``."""


@dataclass(frozen=True)
class Drawn:
    """How a data set of a seed is drawn."""

    sizes: Sizes = Sizes()
    mixture: Mixture = Mixture()


@dataclass(frozen=True)
class GivenWeights:
    """Fixed weights that follow from the weights which another row has learned.

    Attributes:
        of: The name of that row.
        rule: A function from its ``weights.jsonl``, the rows of the training file in the same
            order, and the seed, to the weights in that order.
    """

    of: str
    rule: Callable[[Entries, Entries, int], Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training, whose models are scored on the test set.

    Attributes:
        preset: The shipped preset whose options it has.
        options: The options that differ.
        train: The training file, ``<data set>/<file>``; data sets are named in ``DATA``.
        meta: The meta file, in the same form.
        start: The data set whose cold start it begins from; None: the base model.
        weights: The weights it trains with, if these follow from another row.
        relabel: The rule that corrects its training labels, by the scores of its cold start.
    """

    preset: str = "baseline"
    options: Mapping[str, Any] = field(default_factory=dict)
    train: str = "data/train"
    meta: str = "data/meta"
    start: str | None = "data"
    weights: GivenWeights | None = None
    relabel: Literal["nait"] | None = None

    @property
    def trains(self) -> bool:
        """Whether it takes a step, so that there is a best one on the dev set."""
        return self.options.get("steps") != 0


def _none(**sizes: int) -> Sizes:
    """Return the sizes of a data set that has nothing but what is named."""
    return replace(Sizes(0, 1, 0, 0, 4, 0, 0), **sizes)


def _noise(share: float) -> Drawn:
    """Return the training set in which ``share`` of the solutions is from the bad sources."""
    usual = Mixture()
    part = share / (1 - usual.verified)
    bad = {name: part * getattr(usual, name) for name in ("judge", "rollout", "crowd", "guideline")}
    sizes = _none(train_questions=640, cold_questions=160)
    return Drawn(sizes, replace(usual, verified=1 - share, **bad))


DATA: Mapping[str, Drawn] = {
    "data": Drawn(),
    "large": Drawn(_none(train_questions=2560)),
    **{f"noise-{share}": _noise(share / 100) for share in (20, 40, 60)},
    **{f"meta-{count}": Drawn(_none(meta_questions=count)) for count in (12, 25, 100)},
}
"""Data sets by name. Dev and test set are those of ``data`` for every row."""


def _shuffled(learned: Entries, rows: Entries, seed: int) -> Sequence[float]:
    """Return the learned weights, permuted among the examples."""
    order = np.random.default_rng(seed).permutation(len(learned))
    return [float(learned[place]["weight"]) for place in order]


def _kept(learned: Entries) -> int:
    return sum(entry["weight"] > _KEPT_WEIGHT for entry in learned)


def _small_loss(learned: Entries, rows: Entries, seed: int) -> Sequence[float]:
    """Keep the examples of smallest loss under the cold start, as many as were kept."""
    order = sorted(range(len(learned)), key=lambda place: learned[place]["initial_loss"])
    kept = set(order[: _kept(learned)])
    return [float(place in kept) for place in range(len(learned))]


def _bis(learned: Entries, rows: Entries, seed: int) -> Sequence[float]:
    """Keep the examples of highest Balanced-Information Score, as many as were kept."""
    labels = [[float(step["label"] == "+") for step in row["steps"]] for row in rows]
    longest = max(len(steps) for steps in labels)
    padded = torch.tensor([steps + [float("nan")] * (longest - len(steps)) for steps in labels])
    scores = balanced_information(padded, ~padded.isnan())
    return keep_best(scores, _kept(learned) / len(learned)).tolist()


# Rate and length were chosen on the dev set of another seed, as those of the other rows.
_ON_META = {"lower_data": "meta", "steps": 80, "lower_lr": 3e-4, "lower_warmup": 0.05}
_ON_META |= {"eval_every": 10}
TABLE, NET = Row(preset="train-table"), Row(preset="train-net")

ROWS: Mapping[str, Row] = {
    "base": Row(options={"steps": 0}, start=None),
    "cold_start": Row(options={"steps": 0}),
    "no_selection": Row(),
    "from_base": Row(options={"steps": 60, "lower_warmup": 0.05, "eval_every": 5}, start=None),
    "all_data": Row(train="large/train"),
    "instance_table": TABLE,
    "instance_net": NET,
    "domain_table": Row(preset="train-domain"),
    "step_labels": Row(preset="train-labels"),
    "loss_net": replace(NET, options={"features": ("loss",)}),
    "table_sanity": replace(TABLE, meta="data/dev"),
    "net_sanity": replace(NET, meta="data/dev"),
    "clean_oracle": Row(train="data/clean"),
    "small_loss": Row(weights=GivenWeights("instance_table", _small_loss)),
    "bis": Row(weights=GivenWeights("instance_table", _bis)),
    "nait": Row(relabel="nait"),
    "meta_only": Row(options=_ON_META),
    "outcome_model": Row(options=_ON_META | {"aggregation": "last", "loss_target": "both"}),
    "shuffled_table": Row(weights=GivenWeights("instance_table", _shuffled)),
    "shuffled_net": Row(weights=GivenWeights("instance_net", _shuffled)),
}
"""The rows of the comparison by their names in ``compare.json``."""

QUICK = (
    *("cold_start", "no_selection", "from_base", "instance_table", "instance_net"),
    *("clean_oracle", "small_loss", "meta_only"),
)
"""The rows of the README, which ``--quick`` computes for one seed."""
