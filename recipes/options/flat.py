"""The flat list of the options of a command, and its conversion to nested dataclasses.

Users see flat names only: flags, keys of presets, lines of ``args.yaml``. The code uses groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, TypeVar, get_type_hints

from recipes.options.base import Condition, OnResume, flag_of

Options = TypeVar("Options")


@dataclass(frozen=True)
class FlatOption:
    """One option of a command.

    Attributes:
        name: The flat name.
        hint: The type of its value.
        default: The default value, ``MISSING`` if the option is required.
        help: The text for ``--help``.
        least: The smallest value that is allowed, or None.
        most: The largest value that is allowed, or None.
        conditions: The conditions under which a command reads it, in the order of reports.
        on_resume: What a resumed run may change; see ``recipes.options.base.option``.
        path: Whether the value names a file or folder that the run reads.
        section: The heading that ``--help`` lists it under; empty: none of its own.
    """

    name: str
    hint: Any
    default: Any
    help: str
    least: float | None
    most: float | None
    conditions: tuple[Condition, ...]
    on_resume: OnResume
    path: bool
    section: str

    @property
    def flag(self) -> str:
        """The name of the option on the command line."""
        return flag_of(self.name)


def flat_options(kind: type[Any]) -> Mapping[str, FlatOption]:
    """Return the options of a command by flat name, in the order of ``--help``."""
    more: Mapping[Condition, tuple[str, ...]] = getattr(kind, "ONLY_WITH", {})
    entries: dict[str, FlatOption] = {}
    for entry in _walk(kind, (), tuple(more.items())):
        entries.pop(entry.name, None)  # an option of several variants is listed with the last
        entries[entry.name] = entry
    return entries


def flatten(options: Any) -> dict[str, Any]:
    """Return all values by flat name, with defaults for variants that were not chosen."""
    values: dict[str, Any] = {}
    _collect(options, values)
    return {
        name: values.get(name, entry.default) for name, entry in flat_options(type(options)).items()
    }


def nest(kind: type[Options], values: Mapping[str, Any]) -> Options:
    """Return the options of a command from all values by flat name.

    Values of variants that are not chosen are dropped. ``recipes.options.rules`` refuses them if
    they were given.
    """
    members: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        name = field.metadata.get("name") or field.name
        if "group" in field.metadata:
            members[field.name] = nest(field.metadata["group"], values)
        elif "variants" in field.metadata:
            members[field.name] = nest(field.metadata["variants"][values[name]], values)
        else:
            members[field.name] = values[name]
    return kind(**members)


def _walk(
    kind: type[Any],
    outer: tuple[Condition, ...],
    more: tuple[tuple[Condition, tuple[str, ...]], ...],
    section: str = "",
) -> Iterator[FlatOption]:
    """Yield the options of ``kind``; ``outer`` conditions hold for all, ``more`` by name."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        about = field.metadata
        conditions = (*outer, *about.get("only_with", ()))
        if "group" in about:
            yield from _walk(about["group"], conditions, more, about["section"])
            continue
        name = about.get("name") or field.name
        chosen: Mapping[str, type[Any]] = about.get("variants", {})
        own = [condition for condition, names in more if name in names]
        heading = f"options with {flag_of(name)}" if chosen else section
        yield FlatOption(
            name=name,
            hint=Literal[tuple(chosen)] if chosen else hints[field.name],
            default=about["default"] if chosen else field.default,
            help=about["help"],
            least=about["least"],
            most=about["most"],
            conditions=tuple(sorted((*conditions, *own), key=lambda condition: condition.rank)),
            on_resume=about["on_resume"],
            path=about["path"],
            section=heading,
        )
        for variant in about["listed"] if chosen else ():
            yield from _walk(chosen[variant], conditions, more, heading)


def _collect(options: Any, values: dict[str, Any]) -> None:
    for field in fields(options):
        value = getattr(options, field.name)
        name = field.metadata.get("name") or field.name
        if "variants" in field.metadata:
            values[name] = value.kind
        if "variants" in field.metadata or "group" in field.metadata:
            _collect(value, values)
        else:
            values[name] = value


def required(entry: FlatOption) -> bool:
    """Return whether an option must be given."""
    return entry.default is MISSING
