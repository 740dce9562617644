"""Parse options from the command line, presets and Python, and write them as YAML.

A value of the command line overrides that of the preset, which overrides the default.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from recipes.options.flat import FlatOption, flat_options, flatten, nest, required
from recipes.options.rules import refuse_unread
from recipes.options.train import ColdStartOptions, TrainOptions
from recipes.options.values import (
    OptionError,
    check_limits,
    convert,
    did_you_mean,
    element,
    resume_point,
    shortened,
)
from recipes.options.yaml_file import read_yaml

Options = TypeVar("Options")
PRESETS = Path(__file__).parents[1] / "presets"


def train_options(**values: Any) -> TrainOptions:
    """Return ``TrainOptions`` from flat names, as on the command line: ``lower_lr``, ``bound``, ...

    Raises:
        TypeError: There is no such option, or a required one is missing.
        OptionError: A number is beyond its limits, or an option would have no effect with the
            others.
    """
    return _build(TrainOptions, values)


def cold_start_options(**values: Any) -> ColdStartOptions:
    """Return ``ColdStartOptions`` from flat names; see ``train_options``."""
    return _build(ColdStartOptions, values)


def changed(options: Options, **values: Any) -> Options:
    """Return a copy of the options with some of them, by flat name, replaced.

    Raises:
        TypeError: There is no such option.
        OptionError: A number is beyond its limits, or an option would have no effect with the
            others.
    """
    return _build(type(options), {**flatten(options), **values})


def _build(kind: type[Options], values: Mapping[str, Any]) -> Options:
    entries = flat_options(kind)
    if unknown := [name for name in values if name not in entries]:
        raise TypeError(f"{kind.__name__} has no option {', '.join(unknown)}")
    if missing := _missing(kind, values):
        raise TypeError(f"{kind.__name__} needs {', '.join(missing)}")
    _check_limits(entries, values)
    filled = {name: values.get(name, entry.default) for name, entry in entries.items()}
    refuse_unread(kind, filled)
    return nest(kind, filled)


def _check_limits(entries: Mapping[str, FlatOption], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        for part in value if isinstance(value, tuple) else (value,):
            check_limits(part, entries[name].least, entries[name].most, entries[name].flag)


def _missing(kind: type[Any], values: Mapping[str, Any]) -> list[str]:
    return [n for n, entry in flat_options(kind).items() if required(entry) and n not in values]


def build_parser(
    parser: argparse.ArgumentParser, options: type[Any], *, preset: bool = True
) -> None:
    """Add a flag for each option of ``options`` to ``parser``, and ``--config`` for a preset."""
    if preset:
        parser.add_argument(
            "--config", metavar="YAML", help="preset: a file, or the name of a shipped one"
        )
    sections: dict[str, argparse._ActionsContainer] = {"": parser}
    for name, entry in flat_options(options).items():
        if entry.section not in sections:
            sections[entry.section] = parser.add_argument_group(entry.section)
        section = sections[entry.section]
        # argparse formats help with %, so a literal one must be doubled.
        text = f"{entry.help}{_note(entry)}".replace("%", "%%")
        common: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
        kind, many = element(entry.hint)
        if kind is bool:
            common["action"] = argparse.BooleanOptionalAction
        else:
            common |= {"nargs": "*" if many else None, "metavar": _metavar(entry, kind)}
        section.add_argument(entry.flag, help=text, **common)
        if "_" in name:  # The other spelling, as in presets, without a line of its own.
            section.add_argument(f"--{name}", help=argparse.SUPPRESS, **common)


def _metavar(entry: FlatOption, kind: Any) -> str:
    if get_origin(kind) is Literal:
        # Choices are compared by ``resolve``, whose error is one line with the nearest.
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    numbers = {int: "N", float: "X"}
    return numbers.get(kind) or ("PATH" if entry.path else entry.name.upper().split("_")[-1])


def resolve(options: type[Options], given: Mapping[str, Any]) -> Options:
    """Merge the values of the command line, the preset that it names and the defaults.

    With ``resume`` the options of that run replace the preset.

    Raises:
        OptionError: A preset or key is unknown (the message gives the nearest name), a value has
            the wrong type, is not among the choices or beyond its limits, a required option is
            missing, or an option would have no effect with the others. The run to resume is one
            of the other command.
    """
    given = dict(given)
    preset = given.pop("config", None)
    values: dict[str, Any] = {}
    resumed = given.get("resume") not in (None, "none", "null")
    if resumed and preset is not None:
        raise OptionError("--resume takes the options from the run's args.yaml; leave out --config")
    if resumed or preset is not None:
        path = _args_path(given["resume"]) if resumed else _preset_path(str(preset))
        content = saved_options(path.parent) if resumed else read_yaml(path)
        preset_values = {key.replace("-", "_"): value for key, value in content.items()}
        if resumed and (command := command_of(preset_values)) != command_of(flat_options(options)):
            raise OptionError(
                f"--resume {given['resume']}: is a run of {command}; go on with: "
                f"bilevel-prm {command} --resume {given['resume']}"
            )
        values = _convert_all(options, preset_values, str(path))
    if resumed:
        values["output_dir"] = str(resume_point(given["resume"])[0])
    values.update(_convert_all(options, given))
    entries = flat_options(options)
    _check_limits(entries, values)
    if resumed:
        _check_files(entries, values, path)
    if missing := _missing(options, values):
        flags = ", ".join(entries[name].flag for name in missing)
        raise OptionError(f"missing {flags}; give it on the command line or in the preset")
    return _build(options, values)


def saved_options(run: Path) -> dict[str, Any]:
    """Return the options in the ``args.yaml`` of a run, its paths as they are seen from here.

    A relative path is relative to the folder in which the run began, which ``env.json`` names, or
    else, and if nothing is there, to the current one.

    Raises:
        OptionError: The args.yaml cannot be read.
    """
    values = read_yaml(run / "args.yaml")
    folder = first_folder(run)
    if folder is None or folder == Path.cwd():
        return values
    for name, entry in flat_options(TrainOptions).items():
        value = values.get(name)
        if entry.path and isinstance(value, str) and value != "embedded":
            seen = folder / value
            values[name] = str(seen) if seen.exists() else value
    return values


def first_folder(run: Path) -> Path | None:
    """Return the working directory in which a run began, None if that is not known."""
    try:
        folder = json.loads((run / "env.json").read_text(encoding="utf-8"))["folder"]
        return Path(folder)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _check_files(entries: Mapping[str, FlatOption], values: Mapping[str, Any], args: Path) -> None:
    """Refuse a resumed run whose files are not where its ``args.yaml`` says."""
    for name, value in values.items():
        if name.endswith("_file") and value is not None and not Path(value).exists():
            raise OptionError(
                f"{entries[name].flag} {value}: no such file. Relative paths in {args} are "
                "relative to the folder in which the run began: go on there, or give the option"
            )


def command_of(args: Collection[str]) -> str:
    """Return the command whose options have the names ``args``: ``cold-start`` or ``train``."""
    return "cold-start" if "draw" in args else "train"


def to_yaml(options: Any) -> str:
    """Return all options as flat YAML, from which ``--config`` reads the same options."""
    content = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in flatten(options).items()
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _note(entry: FlatOption) -> str:
    """What ``--help`` says of the value of an option that is not given."""
    if required(entry):
        return " (required)"
    # Without a value of its own the option does what its help then says in words.
    if entry.default in (None, ()) and "default: " in entry.help:
        return ""
    return f" (default: {_show(entry.default)})"


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _preset_path(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    shipped = {p.stem: p for p in sorted(PRESETS.glob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    raise OptionError(
        f"--config {name}: no such file, and no shipped preset of that name "
        f"({', '.join(shipped) or 'none shipped'})" + did_you_mean(name, shipped)
    )


def _args_path(run: str) -> Path:
    path = resume_point(run)[0] / "args.yaml"
    if not path.is_file():
        raise OptionError(f"--resume {run}: expected the directory of a run, found no {path}")
    return path


def _convert_all(
    options: type[Any], given: Mapping[str, Any], file: str | None = None
) -> dict[str, Any]:
    """Return the values of the command line, or with ``file`` of a preset, in their types."""
    entries = flat_options(options)
    for name in given:
        if name not in entries:
            shown = shortened(repr(name))
            raise OptionError(
                f"{file or 'command line'}: unknown option {shown}{did_you_mean(name, entries)}"
            )
    return {
        name: convert(value, entries[name].hint, f"{file}: {name}" if file else entries[name].flag)
        for name, value in given.items()
    }
