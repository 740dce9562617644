"""Write ``prompt`` / ``completions`` / ``labels`` files with weights, for other trainers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prm.data.json_rows import json_rows
from prm.data.record_fields import describe
from prm.data.records import relative
from prm.digests import check_digest
from prm.files import write_lines
from prm.schema import DataError, StepExample


def write_stepwise(
    path: str | Path,
    examples: Iterable[StepExample],
    image_root: str | Path | None = None,
    *,
    soft: bool = False,
    weights: Mapping[str, float] | None = None,
) -> None:
    """Write one row per example: ``id, prompt, completions, labels`` and the optional fields.

    ``images`` (relative to ``image_root``; None means the folder of ``path``), ``domain``,
    ``group``, ``answer`` and ``correct`` are written where an example has them, and ``weight`` if
    ``weights`` are given; ``StepExample.extra`` is not written. A missing label is null. The file
    appears under its name only when it is complete.

    Args:
        path: The file to write.
        examples: The examples to write.
        image_root: Folder below which images are written relative to it.
        soft: Write labels as floats. Otherwise they are true and false, the labels that TRL's
            trainer took (it cut 0.9 to 0), and a probability in between is an error.
        weights: Weight of every id, from ``read_weights``.

    Raises:
        DataError: A label is a probability without ``soft``, an id has no weight, or a weight has
            no example.
    """
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    write_lines(path, _lines(path, examples, root, soft, weights))


def _lines(
    path: Path,
    examples: Iterable[StepExample],
    root: Path,
    soft: bool,
    weights: Mapping[str, float] | None,
) -> Iterator[str]:
    unused = set(weights or ())
    for example in examples:
        row: dict[str, Any] = {
            "id": example.id,
            "prompt": example.question,
            "completions": [step.text for step in example.steps],
            "labels": [_label(step.label, example, soft) for step in example.steps],
        }
        if example.images:
            row["images"] = [relative(image, root) for image in example.images]
        for name in ("domain", "group", "answer", "correct"):
            if getattr(example, name) is not None:
                row[name] = getattr(example, name)
        if weights is not None:
            if example.id not in weights:
                raise DataError(
                    expected=f"one of the {len(weights):,} ids that have a weight",
                    found=repr(example.id),
                    field="id",
                    remedy="use the weights.jsonl of a run on the same file",
                )
            row["weight"] = weights[example.id]
            unused.discard(example.id)
        yield json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    if unused:
        raise DataError(
            expected="an example for every weight",
            found=f"{len(unused):,} weights without one, for example of id {min(unused)!r}",
            file=path,
            remedy="use the weights.jsonl of a run on the same file",
        )


def _label(label: float | None, example: StepExample, soft: bool) -> bool | float | None:
    if label is None or soft:
        return label
    if label not in (0.0, 1.0):
        raise DataError(
            expected="labels 0 and 1 only",
            found=f"the probability {label}",
            example=example.id,
            field="labels",
            remedy="write soft labels (soft=True)",
        )
    return bool(label)


def read_weights(path: str | Path) -> dict[str, float]:
    """Read the weights of a run's ``weights.jsonl``, by id.

    Raises:
        DataError: A line lacks an id or a finite weight, an id occurs twice, or the file is not
            that of the digest beside it (``prm.digests``).
        FileNotFoundError: ``path`` does not exist.
    """
    path = Path(path)
    check_digest(path)
    weights: dict[str, float] = {}
    for line, entry in json_rows(path):
        if isinstance(entry, DataError):
            raise entry
        name = entry.get("id") if isinstance(entry, dict) else None
        weight = _number(entry.get("weight") if isinstance(entry, dict) else None)
        if not isinstance(name, str) or weight is None:
            raise DataError(
                expected='{"id": text, "weight": a finite number}',
                found=describe(entry),
                file=path,
                line=line,
                field="id" if not isinstance(name, str) else "weight",
                remedy="use the weights.jsonl of a run",
            )
        if name in weights:
            raise DataError(
                expected="every id once", found=repr(name), file=path, line=line, field="id"
            )
        weights[name] = weight
    return weights


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
