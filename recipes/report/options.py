"""Options of ``weights`` and ``report``. Nothing here imports torch, so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.options.base import Condition, option

_FILE_WRITTEN = Condition(
    lambda given: given.export is not None or given.annotate is not None,
    text="{flags}: no effect without --export or --annotate",
)
_ANNOTATED = Condition(
    lambda given: given.annotate is not None, text="{flags}: no effect without --annotate"
)


@dataclass(frozen=True, kw_only=True)
class WeightsFlags:
    """Show the weights of a run, or write them where other programs read them."""

    top: int = option(5, "examples shown at either end", least=1, most=1000)
    data: str | None = option(
        None, "the file that the run trained on, if it is not where the args.yaml says"
    )
    export: str | None = option(
        None, "write a table with a row per example: .csv, or .parquet (needs the extra `datasets`)"
    )
    annotate: str | None = option(
        None,
        "write a copy of the data file, in its own format, with the weight of every row (a list "
        "where rows have several solutions; null for rows that the run left out)",
    )
    column: str = option("weight", "name of the field with the weight", only_with=_ANNOTATED)
    overwrite: bool = option(
        False, "replace an existing --export or --annotate", only_with=_FILE_WRITTEN
    )


@dataclass(frozen=True, kw_only=True)
class WeightsOptions(WeightsFlags):
    """``WeightsFlags`` and the run."""

    directory: str = option(..., "run directory")


@dataclass(frozen=True, kw_only=True)
class ReportFlags:
    """Write one page of HTML on runs: results, weights, examples, training, troubles, cost."""

    output: str = option(
        "report.html", "page to write; its figures go into a folder beside it as PNG, too"
    )
    overwrite: bool = option(False, "replace an existing --output")
    data: str | None = option(
        None, "the file that the run trained on, if it is not where the args.yaml says"
    )


@dataclass(frozen=True, kw_only=True)
class ReportOptions(ReportFlags):
    """``ReportFlags`` and the runs."""

    directories: tuple[str, ...] = option(..., "run directories")
