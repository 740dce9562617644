"""A long run on a tiny model: does memory, the number of open files or the time of a step grow?

``python -m recipes.evidence.soak`` trains an InternVL of some thousand parameters for 20,000 steps
of both levels with the loop that every run uses, checkpoints included, and regresses what the
process holds on the step. Written to ``results/soak.json``.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from recipes.run.errors import reported
from recipes.run.files import check_writable, write_json

_BLOCKS = 20
_T_95 = 2.101  # Student's t for 95 % and a line through 20 points.
_WARM_UP = 0.1
LIMITS = {"rss_mib": 0.02, "open_files": 0.02, "cpu_ms_per_step": 0.10}
"""The largest increase over the run, as a share of the mean, that does not count as growth."""


@dataclass(frozen=True)
class Sample:
    """The resources of the process after a number of steps; times are seconds since its start."""

    step: int
    rss_mib: float
    open_files: int
    cpu: float


def sample(step: int) -> Sample:
    """Return the current resources of this process (Linux)."""
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[1])
    rss = pages * os.sysconf("SC_PAGESIZE") / 2**20
    return Sample(step, rss, len(os.listdir("/proc/self/fd")), time.process_time())


def trend(steps: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    """Fit a least-squares line through the means of 20 segments of the run.

    Means are used since neighbouring samples are not independent.

    Returns:
        The mean, the slope per 1000 steps with its 95 % interval, and the growth over all steps
        (slope times steps, with the interval's ends) as a share of the mean.
    """
    x = np.array([np.mean(part) for part in np.array_split(np.asarray(steps, float), _BLOCKS)])
    y = np.array([np.mean(part) for part in np.array_split(np.asarray(values, float), _BLOCKS)])
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    left = y - y.mean() - slope * centred
    spread = _T_95 * float(np.sqrt(left @ left / (_BLOCKS - 2) / (centred @ centred)))
    share = (max(steps) - min(steps)) / float(np.mean(values))
    return {
        "mean": float(np.mean(values)),
        "slope_per_1000_steps": 1000 * slope,
        "low": 1000 * (slope - spread),
        "high": 1000 * (slope + spread),
        "growth": slope * share,
        "growth_low": (slope - spread) * share,
        "growth_high": (slope + spread) * share,
    }


def grows(name: str, line: dict[str, float]) -> bool:
    """Return whether growth is significant at 95 % and larger than the quantity's limit."""
    return line["growth_low"] > 0 and line["growth"] > LIMITS[name]


def report(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the trends of all sampled quantities, without the first tenth of the steps.

    Raises:
        ValueError: There are too few samples for a trend.
    """
    last = samples[-1].step
    rows = [row for row in samples if row.step >= _WARM_UP * last]
    if len(rows) < 2 * _BLOCKS:
        raise ValueError(f"expected at least {2 * _BLOCKS} samples, found {len(rows)}: more steps")
    steps = [row.step for row in rows]
    cost = [1000 * (b.cpu - a.cpu) / (b.step - a.step) for a, b in pairwise(rows)]
    trends = {
        "rss_mib": trend(steps, [row.rss_mib for row in rows]),
        "open_files": trend(steps, [row.open_files for row in rows]),
        "cpu_ms_per_step": trend(steps[1:], cost),
    }
    return {
        "steps": last,
        "samples": len(samples),
        "trends": {k: {n: round(v, 6) for n, v in line.items()} for k, line in trends.items()},
        "grows": [name for name, line in trends.items() if grows(name, line)],
    }


def soak(directory: Path, steps: int) -> dict[str, Any]:
    """Train for ``steps`` below ``directory``, and return the report."""
    from recipes.train.training import run_training

    run = directory / "run"
    options = _options(directory, run, steps)
    samples: list[Sample] = []
    started = time.perf_counter()
    # The loop itself takes the samples. A thread that reads the log would take them at irregular
    # times, miss the last steps, and see files in the middle of a checkpoint.
    run_training(options, logged=lambda step: samples.append(sample(step)))
    trends = report(samples)
    return {**trends, "seconds": round(time.perf_counter() - started, 1)}


def _options(directory: Path, run: Path, steps: int) -> Any:
    """Write a tiny model and data set, and return the options of a run with batches of four."""
    import torch
    from transformers import InternVLForConditionalGeneration

    from recipes.embedded.build import Sizes, build
    from recipes.embedded.vocabulary import (
        SYSTEM_PROMPT,
        base_config,
        build_image_processor,
        build_tokenizer,
    )
    from recipes.options.parse import train_options

    sizes = Sizes(
        train_questions=8, train_solutions=2, cold_questions=1, meta_questions=4, meta_solutions=2,
        dev_questions=1, test_questions=1, candidates=2,
    )  # fmt: skip
    build(directory / "data", seed=0, sizes=sizes)
    torch.manual_seed(0)
    model = directory / "model"
    config = base_config(tower=(16, 1), language=(16, 1))
    InternVLForConditionalGeneration(config).save_pretrained(model)
    build_tokenizer().save_pretrained(model)
    build_image_processor().save_pretrained(model)
    return train_options(
        model=str(model),
        system_prompt=SYSTEM_PROMPT,
        train_file=str(directory / "data" / "train.jsonl"),
        meta_file=str(directory / "data" / "meta.jsonl"),
        output_dir=str(run),
        freeze=("vision_tower",),
        steps=steps,
        batch_size=4,
        meta_batch_size=4,
        upper_start=0,
        weighting="table",
        bound="clip",
        normalise="none",
        lower_lr=1e-4,
        log_every=max(1, steps // 1000),
        save_every=max(1, steps // 40),
        threads=1,
        progress=False,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and write the report; return 1 if a quantity grows."""
    parser = argparse.ArgumentParser(prog="python -m recipes.evidence.soak", description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000, help="steps of both levels")
    parser.add_argument("--output", type=Path, default=Path("results/soak.json"))
    given = parser.parse_args(arguments)
    check_writable("--output", given.output)
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as directory:
        figures = soak(Path(directory), given.steps)
    write_json(given.output, figures)
    print(f"{figures['steps']} steps in {figures['seconds']} s")
    for name, line in figures["trends"].items():
        slope = f"{line['slope_per_1000_steps']:+.5f} [{line['low']:+.5f}, {line['high']:+.5f}]"
        print(
            f"{name:16} mean {line['mean']:9.3f}   per 1000 steps {slope}   "
            f"over the run {line['growth']:+.2%}"
        )
    print("grows: " + (", ".join(figures["grows"]) or "nothing"))
    return 1 if figures["grows"] else 0


if __name__ == "__main__":
    sys.exit(reported("recipes.evidence.soak", main))
