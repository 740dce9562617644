"""The command line: its commands and their arguments.

Arguments are parsed before torch is imported, so that ``--help`` responds at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from recipes.data_files.options import (
    ConvertOptions,
    InspectOptions,
    SplitOptions,
    ValidateOptions,
    build_data_parser,
)
from recipes.options.embedded import CompareOptions, DataOptions, PretrainOptions
from recipes.options.flat import flat_options
from recipes.options.parse import build_parser, resolve
from recipes.options.train import ColdStartOptions, TrainOptions
from recipes.options.use import (
    ConvertModelOptions,
    EnvOptions,
    EvaluateOptions,
    PushFlags,
    PushOptions,
    RelabelOptions,
    ScoreOptions,
    SelectOptions,
    WeighOptions,
)
from recipes.options.values import OptionError, did_you_mean, shortened
from recipes.ranks import silent_unless_first
from recipes.report.options import ReportFlags, ReportOptions, WeightsFlags, WeightsOptions
from recipes.run.provenance import PACKAGE, version_of
from recipes.run.show import RunsListOptions, RunsShowOptions
from recipes.serve.options import ParityOptions, ServeOptions
from recipes.terminal import say, standard_streams

_DESCRIPTION = "Train process reward models with instance weights learned by bilevel optimization."
_COMMANDS = {
    "cold-start": (ColdStartOptions, "short supervised pass over the noisy training data"),
    "train": (TrainOptions, "bilevel training with instance weights, then evaluation"),
    "score": (ScoreOptions, "step scores of every candidate of a file, resumable"),
    "select": (SelectOptions, "the best candidate of every question, from scores"),
    "evaluate": (EvaluateOptions, "how good selections and step scores are, with intervals"),
    "weigh": (WeighOptions, "weights of a trained weighting, or of a rule, for a file's examples"),
    "relabel": (RelabelOptions, "a file with step labels corrected, learned or by a rule"),
    "serve": (ServeOptions, "answer requests to score over HTTP (extra `serve`)"),
    "parity": (ParityOptions, "compare a running server's step scores with ours"),
    "convert-model": (ConvertModelOptions, "rewrite an InternVL checkpoint that needs own code"),
    "compare": (CompareOptions, "every method and control over several seeds, one table"),
}
_DATA_COMMANDS = {
    "embedded": (DataOptions, "write the embedded data set"),
    "pretrain-base": (PretrainOptions, "pretrain the tiny base model that ships with the package"),
}
_FILE_COMMANDS = {
    "validate": (ValidateOptions, "check data files: one page of findings"),
    "convert": (ConvertOptions, "rewrite a data file of any known format"),
    "inspect": (InspectOptions, "show one example as the model gets it"),
    "split": (SplitOptions, "divide a data file into parts that share no question"),
}
_RUN_COMMANDS = {
    "show": (RunsShowOptions, "where a run stands, and how to go on"),
    "list": (RunsListOptions, "all runs below a folder (default: runs)"),
}
_LOOKS: Mapping[str, tuple[type, type, str | None, str]] = {
    "weights": (WeightsOptions, WeightsFlags, None, "the weights of a run: shown, or for others"),
    "report": (ReportOptions, ReportFlags, "+", "one page on runs, with figures"),
    "push": (PushOptions, PushFlags, None, "upload the model of a run to the Hugging Face Hub"),
}
"""Commands that name runs by position: options, flags among them, how many runs, help."""
_KINDS: Mapping[str, Mapping[str, tuple[type, str]]] = {
    "data": _DATA_COMMANDS | _FILE_COMMANDS,
    "runs": _RUN_COMMANDS,
}


class _Parser(argparse.ArgumentParser):
    """Say in one line what is wrong; ``--help`` prints the usage."""

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """Return what an abbreviation can mean; ``--a_b`` and ``--a-b`` are one option."""
        found = super()._get_option_tuples(option_string)
        # Of the two the first, which --help shows.
        return list({match[1].replace("_", "-"): match for match in reversed(found)}.values())

    def error(self, message: str) -> NoReturn:
        say(f"{self.prog}: {message}; see {self.prog} --help", error=True)
        self.exit(2)


class _Version(argparse.Action):
    """Look up the version only if it is requested."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"{PACKAGE} {version_of(PACKAGE)}")
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    parser = _Parser(prog="bilevel-prm", description=_DESCRIPTION)
    parser.add_argument(
        "--version",
        action=_Version,
        nargs=0,
        dest=argparse.SUPPRESS,
        default=argparse.SUPPRESS,
        help="print the version and end",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (options, text) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        build_parser(command, options)
        command.set_defaults(options=options)
    for name, (options, flags, many, text) in _LOOKS.items():
        command = commands.add_parser(name, help=text, description=text)
        directory = "directory" if many is None else "directories"
        command.add_argument(directory, metavar="RUN", nargs=many, help="run directory")
        build_parser(command, flags, preset=False)
        command.set_defaults(options=options)
    about = "versions, devices and commit, for a bug report"
    commands.add_parser("env", help=about, description=about).set_defaults(options=EnvOptions)
    about = "make, check, convert and divide data"
    data = commands.add_parser("data", help=about, description=about)
    kinds = data.add_subparsers(dest="kind", required=True, metavar="kind")
    for name, (options, text) in _DATA_COMMANDS.items():
        command = kinds.add_parser(name, help=text, description=text)
        build_parser(command, options, preset=False)
        command.set_defaults(options=options)
    for name, (options, text) in _FILE_COMMANDS.items():
        command = kinds.add_parser(name, help=text, description=text)
        build_data_parser(command, options)
        command.set_defaults(options=options)
    about = "what runs were and where they stand"
    kinds = commands.add_parser("runs", help=about, description=about).add_subparsers(
        dest="kind", required=True, metavar="kind"
    )
    for name, (options, text) in _RUN_COMMANDS.items():
        command = kinds.add_parser(name, help=text, description=text)
        (flag,) = options.__bases__
        required = None if name == "show" else "?"
        command.add_argument("directory", metavar="DIR", nargs=required, default=argparse.SUPPRESS)
        build_parser(command, flag, preset=False)
        command.set_defaults(options=options)
    return parser


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; see ``recipes.__main__.main``."""
    status = 0
    try:
        with standard_streams(), silent_unless_first():
            status = _run(sys.argv[1:] if arguments is None else arguments)
    except OSError as error:  # a preset, or standard output, which is flushed at the end
        with suppress(OSError):
            say(f"bilevel-prm: {error.filename}: {error.strerror}", error=True)
        return status or 1
    return status


def _run(arguments: Sequence[str]) -> int:
    if text := _unknown_command(arguments):
        say(f"bilevel-prm: {text}", error=True)
        return 2
    known, unknown = make_parser().parse_known_args(arguments)
    given = vars(known)
    name = " ".join(filter(None, (given.pop("command"), given.pop("kind", None))))
    kind = given.pop("options")
    try:
        if unknown:
            raise OptionError(f"{_unknown(unknown[0], kind)}; see --help")
        options = resolve(kind, given)
    except OptionError as error:
        say(f"bilevel-prm {name}: {error}", error=True)
        return 2
    from recipes import commands

    return commands.run(name, options)


def _unknown_command(arguments: Sequence[str]) -> str:
    """Return the error text for a command that there is not, with the nearest; else nothing."""
    known = [*_COMMANDS, *_LOOKS, "env", *_KINDS]
    nested = [f"{name} {kind}" for name, kinds in _KINDS.items() for kind in kinds]
    for word in arguments:
        if word.startswith("-"):
            break
        if word not in known:
            return (
                f"unknown command {shortened(word)!r}{did_you_mean(word, [*known, *nested])}; "
                f"expected {', '.join(known)}"
            )
        if word not in _KINDS:
            break
        known, nested = list(_KINDS[word]), []
    return ""


def _unknown(argument: str, options: type) -> str:
    """Return the error text for an unknown argument, with the nearest option."""
    if not argument.startswith("-"):
        return f"unexpected argument {shortened(argument)!r}"
    flags = ["--config", *(entry.flag for entry in flat_options(options).values())]
    word = argument.split("=")[0]
    return f"unknown option {shortened(word)}{did_you_mean(word.replace('_', '-'), flags)}"
