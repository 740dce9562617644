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
        3, "seeds 0, 1, ...; each has its own data set, test set included", least=1, most=1000
    )
    methods: tuple[str, ...] = option((), "rows to compute; default: all")
    threads: int = option(0, "CPU threads of torch (0: all cores)", least=0, most=MOST_THREADS)
    progress: bool = option(True, "show progress bars")


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
