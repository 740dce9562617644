"""The rows of the comparison, as the options of their runs.

All rows but three start from one cold start and train as long with the same options; ``base`` and
``cold_start`` are scored as they are, and ``from_base`` has no cold start. The top layers of the
model are trained. What the frozen ones compute of a solution is kept on disk, where the rows and
seeds share it. The numbers were fixed before the first run and are not tuned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prm.names import AggregationName
from recipes.options.parse import cold_start_options, train_options
from recipes.options.train import ColdStartOptions, TrainOptions

AGGREGATION: AggregationName = "mean"
KEPT = 0.5
"""The share of the examples that the small-loss filter keeps."""

_TRUSTED: Mapping[str, Any] = {"loss_target": "pairs", "meta_batch_size": 12}
_WEIGHTED: Mapping[str, Any] = {**_TRUSTED, "upper_start": 4, "upper_gradient_every": 2}

ROWS: Mapping[str, Mapping[str, Any]] = {
    "base": {"steps": 0, "init_from": None},
    "cold_start": {"steps": 0},
    "no_selection": {},
    "clean_oracle": {"train": "clean"},
    "instance_table": {
        **_WEIGHTED,
        "weighting": "table",
        "bound": "clip",
        "upper_optimizer": "lazy-adam",
        "upper_betas": (0.0, 0.999),
        "upper_lr": "0.6",
    },
    "instance_net": {
        **_WEIGHTED,
        "weighting": "net",
        "features": ("label", "p_label", "p_plus", "gradient"),
        "gradient_features": 32,
        "upper_lr": "0.03",
    },
    "meta_only": {
        "lower_data": "meta",
        "loss_target": "pairs",
        "batch_size": 12,
        "steps": 30,
        "lower_lr": 2e-4,
        "eval_every": 10,
    },
    "small_loss": {"weights": "small-loss"},
    "from_base": {"init_from": None},
}
"""The rows by their names in the results: what differs from ``no_selection``. ``train`` names the
training file, and ``weights`` the file of fixed weights."""


@dataclass(frozen=True)
class Setup:
    """What all runs of a seed share.

    Attributes:
        directory: The folder of the seed.
        model: The directory of the pretrained model.
        cache: The folder of kept activations.
        seed: The seed.
        layers: The number of layers of the model.
        trained: How many of them, from the top, are trained.
        steps: The lower steps of a row.
        cold_steps: The lower steps of the cold start.
        threads: CPU threads of torch.
    """

    directory: Path
    model: Path
    cache: Path
    seed: int = 0
    layers: int = 30
    trained: int = 4
    steps: int = 108  # five visits to each of 160 rows by a Table, after its first four steps
    cold_steps: int = 10
    threads: int = 1

    def file(self, name: str) -> str:
        """Return the path of a data file."""
        return str(self.directory / "data" / f"{name}.jsonl")

    def run(self, name: str) -> Path:
        """Return the directory of a run."""
        return self.directory / name

    @property
    def cold_start(self) -> ColdStartOptions:
        """The options of the cold start."""
        return cold_start_options(
            **self._common("cold-start"),
            model=str(self.model),
            train_file=self.file("cold-start"),
            draw=0,
            steps=self.cold_steps,
        )

    def row(self, name: str) -> TrainOptions:
        """Return the options of a row, which ends with the model of its best step on dev."""
        own = dict(ROWS[name])
        values: dict[str, Any] = {
            "weighting": "none",
            "init_from": str(self.run("cold-start") / "model"),
            "steps": self.steps,
            "train_file": self.file(own.pop("train", "train")),
            "test_file": self.file("test"),
            "aggregation": AGGREGATION,
        }
        if "weights" in own:
            values["weights_file"] = str(self.directory / f"{own.pop('weights')}.jsonl")
        if "loss_target" in own:
            values["meta_file"] = self.file("meta")
        if own.get("steps") != 0:
            values |= {"dev_file": self.file("dev"), "keep_best": True}
            values["eval_every"] = max(1, self.steps // 3)
        values = {**self._common(name), **values, **own}
        if values["init_from"] is None:
            values["model"] = str(self.model)
        return train_options(**values)

    def last(self, name: str) -> TrainOptions:
        """Return the options that score the test set with the last model of a row."""
        return train_options(
            **self._common(f"{name}-last"),
            weighting="none",
            init_from=str(self.run(name) / "last" / "model"),
            steps=0,
            train_file=self.file("train"),
            test_file=self.file("test"),
            aggregation=AGGREGATION,
        )

    def _common(self, name: str) -> dict[str, Any]:
        frozen = range(self.layers - self.trained)
        return {
            "output_dir": str(self.run(name)),
            "system_prompt": "judge each step of the solution",
            "seed": self.seed,
            "threads": self.threads,
            "device": "cpu",  # whose figures are to be the same on every machine
            "precision": "bf16",  # as on a device, in about 0.7 of the time
            "freeze": ("embed_tokens", *(f"layers.{number}" for number in frozen)),
            "frozen_activations": "disk",
            "frozen_activations_limit": 20.0,
            "cache_dir": str(self.cache),
            "batch_size": 8,
            "lower_lr": 5e-4,
            "lower_warmup": 0.1,
            "save_every": 20,
            "keep_checkpoints": 1,
            "log_every": 5,
            "progress": False,
        }
