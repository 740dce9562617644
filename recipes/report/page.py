"""``bilevel-prm report``: one page of HTML on one run or several, with its figures inside.

The page reads nothing from elsewhere, and runs no script. All that comes from users' files is
escaped by the template.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path
from typing import Any

from prm.files import atomic_write
from recipes.options.rules import check_together
from recipes.options.values import OptionError
from recipes.report.numbers import RunNumbers, names_of, read_run
from recipes.report.options import ReportOptions
from recipes.report.outputs import new_output
from recipes.report.run_files import data_file, files_read, run_options
from recipes.report.run_labels import moved_labels
from recipes.report.run_weights import RunWeights, effective_share
from recipes.terminal import printable, say

NAME = "report.html"
"""The report that a run writes into its directory at its end."""


@dataclass(frozen=True)
class Missing:
    """A figure that is not there, and why."""

    title: str
    reason: str


def run_report(options: ReportOptions) -> None:
    """Write the report of one run or of several.

    Raises:
        OptionError: There is no such run, or the report exists already.
        DataError: A file is not as its run wrote it.
        ModuleNotFoundError: The extra ``report`` is not installed.
        OSError: The report cannot be written.
    """
    check_together(options)
    require_extra()
    directories = [Path(name) for name in options.directories]
    if len({path.resolve() for path in directories}) < len(directories):
        raise OptionError("a run is named twice; name each once")
    if options.data is not None and len(directories) > 1:
        raise OptionError("--data: names the data file of one run; leave it out with several")
    names = names_of(directories)
    runs = [
        read_run(path, name, options.data) for path, name in zip(directories, names, strict=True)
    ]
    inputs = [file for path in directories for file in _files_read(path, options.data)]
    pictures = write_report(runs, options.output, overwrite=options.overwrite, inputs=inputs)
    say(f"{options.output} (runs: {len(runs)}, figures: {pictures}, each in {figures_of(options)})")


def _files_read(directory: Path, data: str | None) -> tuple[Path, ...]:
    return files_read(directory, data_file(run_options(directory), data))


def figures_of(options: ReportOptions) -> Path:
    """Return the folder of the figures of a report."""
    return _figures(Path(options.output))


def _figures(path: Path) -> Path:
    return path.with_name(f"{path.stem}_figures")


def require_extra() -> None:
    """Find out whether what draws and lays out is installed.

    Raises:
        ModuleNotFoundError: It is not; the message names the extra.
    """
    for package in ("matplotlib", "jinja2"):
        try:
            import_module(package)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"a report is drawn with {package}, which is not installed: "
                "pip install 'bilevel-prm[report]'"
            ) from error


def report_at_end(directory: Path) -> None:
    """Write the report of a run that has just ended into its directory, if the extra is installed.

    The run is complete by then, so that an error of the report is told and leads to nothing else.
    """
    try:
        require_extra()
    except ModuleNotFoundError:
        return
    path = directory / NAME
    try:
        write_report([read_run(directory, directory.name)], str(path), overwrite=True)
    except (ValueError, OSError) as error:  # OptionError and DataError are ValueErrors
        say(f"no report: {error}", error=True)
    else:
        say(f"report: {path}")


def write_report(
    runs: Sequence[RunNumbers], output: str, *, overwrite: bool, inputs: Sequence[Path] = ()
) -> int:
    """Write the page, and each figure as PNG into a folder beside it.

    Args:
        runs: The runs, in the order in which they are shown.
        output: The file to write.
        overwrite: Whether an existing page and its figures are replaced.
        inputs: Files that are never replaced.

    Returns:
        The number of figures.

    Raises:
        OptionError: The page or the folder of its figures exists, or it is one of ``inputs``.
        OSError: It cannot be written.
    """
    from recipes.report.drawing import Picture

    folder = _figures(Path(output))
    with new_output(
        "--output", output, overwrite=overwrite, inputs=inputs, beside=(folder,)
    ) as file:
        content = page_content(runs)
        pictures = [one for one in _all(content) if isinstance(one, Picture)]
        for picture in pictures:
            with atomic_write(folder / f"{picture.name}.png") as unfinished:
                unfinished.write_bytes(picture.png)
        file.write_text(rendered(content), encoding="utf-8", newline="\n")
    return len(pictures)


def _all(content: Mapping[str, Any]) -> list[Any]:
    figures = list(content["results"]) + list(content["training"]) + list(content["cost"])
    return figures + [figure for run in content["runs"] for figure in run["figures"]]


def page_content(runs: Sequence[RunNumbers]) -> dict[str, Any]:
    """Return what the template shows: figures or the reasons why they are missing, and numbers."""
    from recipes.report import drawing

    files = list(dict.fromkeys(part.file for run in runs for part in run.files))
    results: list[Any] = [drawing.results(runs, file) for file in files]
    if not results:
        results = [Missing("Best-of-N accuracy", "no run has results yet: `train` ends with them")]
    results.append(
        drawing.best_of_k(runs)
        or Missing("Best of k", "no results.json here has the curves (older runs have none)")
    )
    training = [
        drawing.losses(runs) or Missing("Losses of both levels", "no run has a log"),
        drawing.dev_set(runs)
        or Missing("The development set over the steps", "no run scored it (--eval-every N)"),
        drawing.trajectories(runs)
        or Missing("Weights over the steps", "no run here learned weights of examples"),
        *filter(None, [drawing.moved_labels(runs)]),
    ]
    cost = [drawing.seconds(runs) or Missing("Time per part", "written when a run is complete")]
    return {
        "title": f"Report on {runs[0].name if len(runs) == 1 else f'{len(runs)} runs'}",
        "results": results,
        "training": training,
        "cost": cost,
        "numbers": runs,
        "runs": [_run(run, f"run-{place}") for place, run in enumerate(runs, start=1)],
    }


def _run(run: RunNumbers, anchor: str) -> dict[str, Any]:
    from recipes.report import drawing

    figures: list[Any] = []
    summary: dict[str, str] = {}
    weights = run.weights
    if isinstance(weights, RunWeights):
        kinds = list(weights.groups) or ["all"]
        figures += [drawing.weights_by(weights, kind, anchor) for kind in kinds]
        if weights.absent is not None:
            reason = f"{weights.absent}; the histogram of all is shown"
            figures.append(Missing("Weights by source and domain", reason))
        figures.append(
            drawing.weight_against_loss(weights, anchor)
            or Missing("Weight against initial loss", "the run did not record initial losses")
        )
        values = weights.weight
        summary = {
            "examples": f"{len(values):,}",
            "weights": f"{values.min():.3f} to {values.max():.3f}, mean {values.mean():.3f}",
        }
        if not run.labels:  # no loss is multiplied by what stands for weights beside labels
            summary["effective sample size"] = f"{effective_share(values):.0%}"
        names = {
            "weight_auc": "AUC of the weights, right against wrong labels",
            "weight_label_correlation": "rank correlation of weights with the share of + labels",
        }
        summary |= {names[key]: f"{value:.3f}" for key, value in run.facts.items()}
        if run.labels:
            labels = moved_labels(run.labels)
            turned = sum(label.turned_over for label in labels)
            summary["labels turned over"] = f"{turned:,} of {len(labels):,}"
    else:
        figures.append(Missing("Weights", weights))
    return {"run": run, "anchor": anchor, "figures": figures, "summary": summary}


def rendered(content: Mapping[str, Any]) -> str:
    """Return the page."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["printable"] = lambda text: printable(text, keep="\n")
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    text = resources.files("recipes").joinpath("report", "page.html.j2").read_text("utf-8")
    return environment.from_string(text).render(**content)
