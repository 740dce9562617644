"""How a reward model is asked and how its answers are read: the file ``prm.json`` in its folder.

    {"format": 1, "labels": {"+": 10, "-": 12}, "layout": {"first_turn": ..., ...},
     "system_prompt": ..., "context": "plus", "max_patches": 6, "probability": "labels",
     "aggregation": "mean", "threshold": 0.5}

A model that was trained with one prompt and is asked with another gives other scores, and nothing
shows it. So the folder says what the weights were trained with; transformers ignores the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from prm.files import write_lines
from prm.inputs.prompt import SYSTEM_PROMPT
from prm.names import AggregationName, Context, Probability
from prm.schema import DataError

FILE = "prm.json"
FORMAT = 1
LAYOUT: Mapping[str, str] = MappingProxyType(
    {
        "first_turn": "### Question:\n{question}\n\n### Solution Process:\n{step}",
        "turn": "{step}",
        "slot": "{label}",
    }
)
"""What the turns hold, which the tokenizer's chat template renders: after the system turn one of
the user for every step, each followed by one of the assistant, whose whole content is the slot. The
images stand in front of the first. A label is predicted at the token before its slot."""

_LARGEST = 2**20


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """What must be the same whenever a model is asked, and how its step scores are used.

    Attributes:
        plus_id: The token id of "+".
        minus_id: The token id of "-".
        system_prompt: The text of the system turn. None means no system turn.
        context: What the assistant slots of earlier steps held in training.
        max_patches: The largest number of tiles per image, without the thumbnail. None means the
            image processor's number.
        probability: What the softmax of a step score is over: the two labels or the vocabulary.
        aggregation: How the step scores of a solution become its score.
        threshold: A step whose score exceeds it is judged right. 1/2 unless it was chosen on a
            development set.

    Raises:
        ValueError: A value is none of those that its field can have.
    """

    plus_id: int
    minus_id: int
    system_prompt: str | None = SYSTEM_PROMPT
    context: Context = "plus"
    max_patches: int | None = None
    probability: Probability = "labels"
    aggregation: AggregationName = "mean"
    threshold: float = 0.5

    def __post_init__(self) -> None:
        for name, (expected, is_one) in _VALUES.items():
            if not is_one(value := getattr(self, name)):
                raise ValueError(f"{name}: expected {expected}, found {value!r}")
        if self.plus_id == self.minus_id:
            raise ValueError(f"expected two label tokens, found {self.plus_id} for both")


def read_conventions(path: Path) -> Conventions:
    """Return the conventions in a file that ``write_conventions`` wrote.

    Raises:
        DataError: The file is damaged or of a newer version, or a field is missing, unknown, or has
            a value that it cannot have. The error names file and field.
    """
    content = _object(path)
    version = content.get("format")
    if type(version) is int and version > FORMAT:
        raise DataError(
            expected=f"{FORMAT}, the newest format that this version reads",
            found=f"{version}",
            file=path,
            field="format",
            remedy="install a newer bilevel-prm",
        )
    names = ("format", "labels", "layout", *_VALUES)
    for wrong, found in (
        ([name for name in names if name not in content], "nothing"),
        ([name for name in content if name not in names], "a field of this name"),
    ):
        if wrong:
            listed = ", ".join(names)
            raise DataError(expected=f"the fields {listed}", found=found, file=path, field=wrong[0])
    labels = content["labels"]
    is_pair = isinstance(labels, dict) and sorted(labels) == ["+", "-"]
    checks: dict[str, tuple[str, bool]] = {
        "format": (f"{FORMAT}", type(version) is int and version == FORMAT),
        "layout": (f"{dict(LAYOUT)}, the only layout of this version", content["layout"] == LAYOUT),
        "labels": (
            'the ids of two tokens, {"+": ..., "-": ...}',
            is_pair and all(map(_is_id, labels.values())) and labels["+"] != labels["-"],
        ),
    }
    checks |= {name: (what, is_one(content[name])) for name, (what, is_one) in _VALUES.items()}
    for name, (expected, fits) in checks.items():
        if not fits:
            raise DataError(
                expected=expected, found=repr(content[name])[:200], file=path, field=name
            )
    values = {name: content[name] for name in _VALUES}
    return Conventions(plus_id=labels["+"], minus_id=labels["-"], **values)


def write_conventions(path: Path, conventions: Conventions) -> None:
    """Write the file; an earlier one is replaced as a whole.

    Raises:
        OSError: It cannot be written.
    """
    content = {
        "format": FORMAT,
        "labels": {"+": conventions.plus_id, "-": conventions.minus_id},
        "layout": dict(LAYOUT),
        **{name: getattr(conventions, name) for name in _VALUES},
    }
    write_lines(path, [json.dumps(content, indent=2, ensure_ascii=False), "\n"])


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0


def _one_of(kind: Any) -> tuple[str, Callable[[Any], bool]]:
    names = get_args(kind)
    return f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names


_VALUES: Mapping[str, tuple[str, Callable[[Any], bool]]] = MappingProxyType(
    {
        "system_prompt": ("a text, or null", lambda value: isinstance(value, str | None)),
        "context": _one_of(Context),
        "max_patches": (
            "a number of at least 1, or null",
            lambda value: value is None or (type(value) is int and value >= 1),
        ),
        "probability": _one_of(Probability),
        "aggregation": _one_of(AggregationName),
        "threshold": (
            "a number in [0, 1]",
            lambda value: type(value) in (int, float) and 0 <= value <= 1,
        ),
    }
)
"""What each field of the file can be, in words and as a check."""


def _object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file in which no key occurs twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key that is there twice")
        return found

    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST + 1)
        if len(raw) > _LARGEST:
            raise ValueError(f"more than {_LARGEST:,} bytes")
        content = json.loads(raw.decode(), object_pairs_hook=unique)
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
    except (ValueError, RecursionError) as error:
        raise DataError(
            expected="a JSON object, the conventions of a reward model",
            found=str(error) or type(error).__name__,
            file=path,
            remedy="copy the model again; without the file it is asked by the library's defaults",
        ) from error
    return content
