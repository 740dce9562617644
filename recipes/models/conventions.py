"""How a command asks a model: as its folder says (``prm.conventions``), and else as options do.

A model is used as it was trained, so that no option need be repeated; one that says otherwise is
refused. A command that trains sets the conventions of the model that it writes. Aggregation and
threshold are no part of the question: the folder names those to take where no option does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from prm.conventions import Conventions
from prm.models.model import PRM
from recipes.options.base import flag_of
from recipes.options.values import shortened

OF_ANSWERS = ("probability", "aggregation", "threshold")
"""Options of the answers of a model, which not every command has."""

_ASKED = ("system_prompt", "context", "max_patches", "probability")
_MAX_PATCHES = 6
_SHOWN = 100


def agreed(
    prm: PRM, given: Mapping[str, Any], path: Path, *, trains: bool, hides_labels: bool
) -> Conventions:
    """Return how a command asks a model and reads its answers.

    A model that was trained with the labels of earlier steps before its eyes (``context`` "gold")
    is asked with "+" in their place where labels must not reach it, unless the options ask for
    them: those of the rows that are judged would give the next away.

    Args:
        prm: The model.
        given: The options that were given, by the names of ``Conventions``.
        path: The file of the model's conventions, for messages.
        trains: Whether the command trains the model.
        hides_labels: Whether the labels of the rows that are judged must not reach the model.

    Raises:
        ValueError: An option contradicts the conventions of the model.
    """
    own = prm.conventions
    if own is None:
        return replace(prm.usage, **{"max_patches": _MAX_PATCHES, **given})
    if trains:
        return replace(own, **{"threshold": 0.5, **given})
    asked = own
    if hides_labels and own.context == "gold":
        asked = replace(own, context="plus")
    differ = [
        name
        for name in _ASKED
        if name in given and given[name] not in (getattr(own, name), getattr(asked, name))
    ]
    if differ:
        told = ", ".join(
            f"{flag_of(name)} {shortened(str(given[name]), _SHOWN)}" for name in differ
        )
        says = ", ".join(
            f"{name}: {shortened(_json(getattr(own, name)), _SHOWN)}" for name in differ
        )
        raise ValueError(
            f"{told}: {path} says {says}, as the model was trained; leave the option out, or "
            "change the file to use the model otherwise on purpose"
        )
    return replace(asked, **given)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
