"""Run each command with its options, and report its errors."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from prm.schema import DataError
from recipes.data_files import commands as data_commands
from recipes.options.embedded import DataOptions, PretrainOptions
from recipes.options.use import (
    ConvertModelOptions,
    EnvOptions,
    EvaluateOptions,
    ScoreOptions,
    SelectOptions,
    WeighOptions,
)
from recipes.options.values import OptionError
from recipes.run.errors import RunError, Stopped
from recipes.run.files import new_directory
from recipes.run.show import RunsListOptions, RunsShowOptions, list_runs, show_run
from recipes.run.stopping import Interrupted, interrupting
from recipes.terminal import say

_SAVING = ("cold-start", "train", "score", "compare")
"""Commands that save while they work, and go on from there."""


def run(name: str, options: Any) -> int:
    """Run a command and return its exit status.

    Errors of the user (options, data) and of the machine (files that cannot be read or written)
    end in one line that says what to change, without a traceback. Errors of the program keep their
    traceback. A signal interrupts the work, or ends the process while a module is imported.
    """
    try:
        with interrupting():
            return _COMMANDS[name](options) or 0
    except Stopped as error:
        return _ended(name, error, error.status)
    except OptionError as error:
        return _ended(name, error, 2)
    except (DataError, RunError, SafetensorError) as error:  # the last: of a full disk, for one
        return _ended(name, error, 1)
    except OSError as error:
        return _ended(name, reason(error), 1)
    except ModuleNotFoundError as error:
        if "bilevel-prm[" not in str(error):
            raise
        return _ended(name, error, 1)
    except KeyboardInterrupt as error:
        print(file=sys.stderr)  # ends the line of the terminal's ^C, or of a progress bar
        kept = "; what was logged and saved so far is kept" if name in _SAVING else ""
        number = error.number if isinstance(error, Interrupted) else signal.SIGINT
        return _ended(name, f"interrupted{kept}", 128 + number)


def _ended(name: str, why: object, status: int) -> int:
    say(f"bilevel-prm {name}: {why}", error=True)
    return status


def reason(error: OSError) -> str:
    """Return path and reason of an error of the operating system, as one phrase."""
    if error.strerror is None:
        return str(error)
    path = error.filename if error.filename2 is None else error.filename2
    name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else path
    return error.strerror if name is None else f"{name}: {error.strerror}"


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
    from recipes.train.training import run_training

    _quiet()
    run_training(options)


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


def _weigh(options: WeighOptions) -> None:
    from recipes.use.weigh import run_weigh

    _quiet()
    run_weigh(options)


def _convert_model(options: ConvertModelOptions) -> None:
    from recipes.use.convert_model import run_convert_model

    _quiet()
    run_convert_model(options)


def _env(options: EnvOptions) -> None:
    from recipes.run.provenance import environment_text

    print(environment_text())


def _compare(options: Any) -> None:
    from recipes.embedded.compare import compare

    _quiet()
    compare(options)


def _data_embedded(options: DataOptions) -> None:
    from recipes.embedded.build import build

    rows = build(Path(options.out), seed=options.seed)
    say(f"{options.out}: " + ", ".join(f"{name} {count}" for name, count in rows.items()))


def _data_pretrain_base(options: PretrainOptions) -> None:
    from recipes.embedded.pretrain import pretrain_base
    from recipes.loading import set_up

    _quiet()
    new_directory("--out", options.out)
    set_up(options)
    accuracies = pretrain_base(Path(options.out), seed=options.seed, scale=options.scale)
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
