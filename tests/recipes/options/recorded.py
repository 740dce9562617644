"""Options that note which of them are read."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import recipes.run.directory
import recipes.run.resume
import recipes.train.cold_start
import recipes.train.training
from recipes.options.flat import flat_options, flatten
from recipes.options.parse import changed
from recipes.options.rules import unread
from recipes.run.identity import digest_model


def _identity(options: Any, model: Any, pictures: Any) -> dict[str, Any]:
    """The identity of a run without its options."""
    digests = {"train_file": "", "meta_file": ""}
    return {"model": digest_model(model), "files": digests, "pictures": digests}


def recorded(options: Any) -> tuple[Any, set[str]]:
    """The same options, and the set of the flat names of those that have been read since."""
    seen: set[str] = set()
    made = _recording(options, seen)
    seen.clear()
    return made, seen


def _recording(options: Any, seen: set[str]) -> Any:
    kind = type(options)
    names = {f.name: f.metadata.get("name") or f.name for f in fields(kind)}
    nested = {f.name for f in fields(kind) if f.metadata.keys() & {"group", "variants"}}

    class Recording(kind):
        def __getattribute__(self, name):
            if name in names:
                seen.add(names[name])
            return super().__getattribute__(name)

    values = {name: getattr(options, name) for name in names}
    return Recording(
        **{n: _recording(value, seen) if n in nested else value for n, value in values.items()}
    )


def read_only_what_is_used(monkeypatch) -> None:
    """Take from training and cold start what looks at every option without using one.

    These are the files that keep the options of a run, the check of what was given, and the copy in
    which those of the prompt are the model's.
    """
    monkeypatch.setattr(recipes.run.directory, "to_yaml", lambda options: "")
    monkeypatch.setattr(recipes.run.directory, "flatten", lambda options: {})
    monkeypatch.setattr(recipes.run.resume, "identity", _identity)
    for module in (recipes.train.training, recipes.train.cold_start):
        monkeypatch.setattr(module, "check_together", lambda options: None)
        monkeypatch.setattr(module, "write_card", lambda directory, results: None)
        monkeypatch.setattr(module, "filled", lambda options, conventions: options)


def not_read(kind: type[Any], *seen: set[str]) -> set[str]:
    """Options of a command in none of some sets."""
    return set(flat_options(kind)) - set().union(*seen)


def where_read(options: Any, **values: Any) -> Any:
    """The same options with ``values``, by flat name; what would not be read at its default."""
    merged, entries = {**flatten(options), **values}, flat_options(type(options))
    idle = {name: entries[name].default for name in unread(type(options), merged)}
    return changed(options, **{**merged, **idle})
