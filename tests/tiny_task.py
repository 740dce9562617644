"""A small embedded data set and a random model of a few thousand parameters: runs of a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from recipes.embedded.tiny import SIZES as SIZES
from recipes.embedded.tiny import write_tiny
from recipes.embedded.vocabulary import SYSTEM_PROMPT
from recipes.options.parse import cold_start_options, train_options
from recipes.options.train import ColdStartOptions, TrainOptions

# torch itself scripts its decompositions when forward mode is first used.
FORWARD_MODE = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)


@dataclass(frozen=True)
class Task:
    """Where data and model are, and the options of short runs on them."""

    data: Path
    model: Path

    def cold_start(self, output: Path, **more: Any) -> ColdStartOptions:
        return cold_start_options(
            **{**self._common(output), "steps": 3, "batch_size": 6, "draw": 10, **more}
        )

    def train(self, output: Path, **more: Any) -> TrainOptions:
        """Four steps of six examples; with a weighting, upper level from the second step.

        Options that would do nothing beside those of ``more`` are left out.
        """
        short: dict[str, Any] = {
            "test_file": str(self.data / "test.jsonl"),
            "steps": 4,
            "batch_size": 6,
            "lower_warmup": 0.0,
        }
        weighted = more.get("weighting") != "none"
        if weighted or more.get("lower_data") == "meta":
            short["meta_file"] = str(self.data / "meta.jsonl")
        if weighted:
            short |= {"meta_batch_size": 6, "upper_start": 1}
        made = {**self._common(output), **short, **more}
        if "init_from" in made:
            del made["model"]
        return train_options(**made)

    def _common(self, output: Path) -> dict[str, Any]:
        return {
            "model": str(self.model),
            "system_prompt": SYSTEM_PROMPT,
            "train_file": str(self.data / "train.jsonl"),
            "output_dir": str(output),
            "allow_outside_images": True,  # those of ``altered`` files
            "freeze": ("vision_tower",),
            "lower_lr": 2e-3,
            "log_every": 1,
            "progress": False,
        }


def make_task(directory: Path) -> Task:
    """Write data and model below ``directory``, unless they are there."""
    task = Task(directory / "data", directory / "model")
    write_tiny(task.data, task.model)
    return task


@pytest.fixture(scope="session")
def task(tmp_path_factory) -> Task:
    """Made once, whichever tests ask for it first."""
    return make_task(tmp_path_factory.getbasetemp() / "tiny-task")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def altered(
    source: Path, target: Path, change: Callable[[int, dict[str, Any]], dict[str, Any]]
) -> Path:
    """A copy of a JSONL file with every row changed; images stay where they are."""
    rows = []
    for place, row in enumerate(read_lines(source)):
        row["images"] = [str(source.parent / image) for image in row["images"]]
        rows.append(change(place, row))
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return target


def model_bits(run: Path) -> bytes:
    """The saved parameters of a run."""
    return (run / "model" / "model.safetensors").read_bytes()
