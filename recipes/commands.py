"""Run each command with its options, and report its errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes.data_files import commands as data_commands
from recipes.options.embedded import DataOptions, PretrainOptions
from recipes.options.use import (
    ConvertModelOptions,
    EnvOptions,
    EvaluateOptions,
    PushOptions,
    RelabelOptions,
    ScoreOptions,
    SelectOptions,
    WeighOptions,
)
from recipes.ranks import (
    is_first,
    leave,
    lost,
    over_ranks,
    ranks_here,
    say_aloud,
    several_ranks,
)
from recipes.report.options import ReportOptions, WeightsOptions
from recipes.run.errors import RunError, left_apart, reported
from recipes.run.files import new_directory
from recipes.run.show import RunsListOptions, RunsShowOptions, list_runs, show_run
from recipes.serve.options import ParityOptions, ServeOptions
from recipes.terminal import say

_SAVING = ("cold-start", "train", "score", "compare")
"""Commands that save while they work, and go on from there."""


def run(name: str, options: Any) -> int:
    """Run a command and return its exit status; ``recipes.run.errors`` says what errors end in."""

    def command() -> int | None:
        return _over_ranks(name, options) if several_ranks() else _COMMANDS[name](options)

    return reported(f"bilevel-prm {name}", command, saves=name in _SAVING)


def _over_ranks(name: str, options: Any) -> int:
    """Run a command as one of several ranks, and wait for the others unless it is interrupted."""
    interrupted: list[KeyboardInterrupt] = []
    title = f"bilevel-prm {name}"
    with over_ranks(name) as folder:
        own = options
        if folder is not None and getattr(options, "output", None) not in (None, "-"):
            own = replace(options, output=str(folder / Path(options.output).name))

        def command() -> int | None:
            try:
                with _telling_others():
                    return _COMMANDS[name](own)
            except KeyboardInterrupt as error:
                interrupted.append(error)
                return None
            except Exception as error:
                alone = left_apart(error)
                if (lost(error) or alone) and not is_first():
                    say_aloud(f"{title}: {error}")
                if alone:
                    leave()
                raise

        status = reported(title, command)
        if interrupted:
            raise interrupted[0]
    return status


@contextmanager
def _telling_others() -> Iterator[None]:
    """Tell the other ranks of an error of the body, and be told of theirs.

    Raises:
        RunError: Another rank has failed or has gone.
    """
    from bilevel import RankError

    try:
        with ranks_here().together():
            yield
    except RankError as error:
        raise RunError(str(error)) from error


def _quiet() -> None:
    """Turn off the progress bars and warnings of transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _cold_start(options: Any) -> None:
    from recipes.train.cold_start import run_cold_start

    _quiet()
    run_cold_start(options)


def _train(options: Any) -> None:
    from recipes.report.page import report_at_end
    from recipes.train.training import run_training

    _quiet()
    directory = run_training(options)
    if is_first():
        report_at_end(directory)


def _score(options: ScoreOptions) -> None:
    from recipes.use.score import run_score

    _quiet()
    run_score(options)


def _select(options: SelectOptions) -> None:
    from recipes.use.select import run_select

    run_select(options)


def _evaluate(options: EvaluateOptions) -> None:
    from recipes.use.evaluate import run_evaluate

    _quiet()
    run_evaluate(options)


def _relabel(options: RelabelOptions) -> None:
    from recipes.use.relabel import run_relabel

    _quiet()
    run_relabel(options)


def _weigh(options: WeighOptions) -> None:
    from recipes.use.weigh import run_weigh

    _quiet()
    run_weigh(options)


def _report(options: ReportOptions) -> None:
    from recipes.report.page import run_report

    run_report(options)


def _weights(options: WeightsOptions) -> None:
    from recipes.report.weights_page import run_weights

    run_weights(options)


def _push(options: PushOptions) -> None:
    from recipes.use.push import run_push

    run_push(options)


def _serve(options: ServeOptions) -> None:
    from recipes.serve.server import run_serve

    _quiet()
    run_serve(options)


def _parity(options: ParityOptions) -> int:
    from recipes.serve.parity import run_parity

    _quiet()
    return run_parity(options)


def _convert_model(options: ConvertModelOptions) -> None:
    from recipes.use.convert_model import run_convert_model

    _quiet()
    run_convert_model(options)


def _env(options: EnvOptions) -> None:
    from recipes.run.provenance import environment_text

    print(environment_text())


def _compare(options: Any) -> None:
    from recipes.comparison.compare import compare

    _quiet()
    compare(options)


def _data_embedded(options: DataOptions) -> None:
    from recipes.embedded.build import build

    rows = build(Path(options.out), seed=options.seed)
    say(f"{options.out}: " + ", ".join(f"{name} {count}" for name, count in rows.items()))


def _data_pretrain_base(options: PretrainOptions) -> None:
    from recipes.embedded.pretrain import pretrain_base
    from recipes.models.loading import set_up

    _quiet()
    new_directory("--out", options.out)
    set_up(options)
    start = Path(options.start_from) if options.start_from is not None else None
    accuracies = pretrain_base(
        Path(options.out), seed=options.seed, scale=options.scale, start=start
    )
    print(json.dumps(accuracies))


def _data_validate(options: Any) -> int:
    _quiet()
    return data_commands.data_validate(options)


def _data_inspect(options: Any) -> int:
    _quiet()
    return data_commands.data_inspect(options)


def _runs_show(options: RunsShowOptions) -> None:
    show_run(options)


def _runs_list(options: RunsListOptions) -> None:
    list_runs(options)


_COMMANDS: Mapping[str, Callable[[Any], int | None]] = {
    "cold-start": _cold_start,
    "train": _train,
    "score": _score,
    "select": _select,
    "evaluate": _evaluate,
    "weigh": _weigh,
    "relabel": _relabel,
    "weights": _weights,
    "report": _report,
    "push": _push,
    "serve": _serve,
    "parity": _parity,
    "convert-model": _convert_model,
    "compare": _compare,
    "env": _env,
    "data embedded": _data_embedded,
    "data pretrain-base": _data_pretrain_base,
    "data validate": _data_validate,
    "data convert": data_commands.data_convert,
    "data inspect": _data_inspect,
    "data split": data_commands.data_split,
    "runs show": _runs_show,
    "runs list": _runs_list,
}
