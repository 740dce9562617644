"""Options of the commands of the embedded task: its data, its base model, the comparison."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.options.base import MOST_SEED, MOST_THREADS, option


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Compare every method and control of the embedded task over several seeds."""

    output_dir: str = option("results", "where compare.json is written")
    work_dir: str = option("runs/compare", "where data sets and runs of each seed are kept")
    seeds: int = option(
        5, "how many seeds; each has its own data set, test set included", least=1, most=1000
    )
    first_seed: int = option(0, "the first of the seeds", least=0, most=MOST_SEED - 1000)
    setting_seeds: int = option(
        1, "how many of the seeds have the rows that vary one setting", least=0, most=1000
    )
    methods: tuple[str, ...] = option((), "rows and settings to compute; default: all")
    quick: bool = option(False, "one seed and the rows of the README only")
    jobs: int = option(
        0, "runs side by side, each on one thread (0: as many as cores)", least=0, most=1000
    )
    progress: bool = option(True, "show how far it is")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Write the embedded data set."""

    out: str = option("data/embedded", "directory to write; must not exist")
    seed: int = option(0, "fixes questions, pictures, mistakes and labels", least=0, most=MOST_SEED)


@dataclass(frozen=True, kw_only=True)
class PretrainOptions:
    """Pretrain the tiny base model."""

    out: str = option(..., "directory to write the model, tokenizer and image processor to")
    seed: int = option(0, "fixes initial weights and data", least=0, most=MOST_SEED)
    scale: float = option(1.0, "multiplies the number of steps of every stage", least=0, most=1000)
    start_from: str | None = option(
        None, "model after the first four stages, for the last one alone"
    )
    threads: int = option(0, "CPU threads of torch (0: all cores)", least=0, most=MOST_THREADS)
