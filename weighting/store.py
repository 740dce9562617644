"""Save and load weighting: ``config.json`` + ``params.safetensors`` + ``ids.json``.

An Instance Table is worth nothing without the ids of its rows, so they are saved together and
checked together.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from weighting.bounds import Bound, Clip, LeakyReLU, Sigmoid, Softplus, Unbounded
from weighting.instance_net import InstanceNet
from weighting.tables import DomainTable, InstanceTable

Weighting = InstanceTable | InstanceNet | DomainTable
_WEIGHTINGS: Mapping[str, type] = {c.__name__: c for c in (InstanceTable, InstanceNet, DomainTable)}
_FILES = ("config.json", "params.safetensors", "ids.json")
_BOUNDS: Mapping[str, type] = {
    c.__name__: c for c in (Clip, Sigmoid, Softplus, LeakyReLU, Unbounded)
}


def row_index(ids: Sequence[str]) -> dict[str, int]:
    """Id -> row, in the order given.

    Raises:
        ValueError: an id that occurs twice; the two instances would silently share one weight.
    """
    rows: dict[str, int] = {}
    for row, name in enumerate(ids):
        if name in rows:
            raise ValueError(
                f"id {name!r} occurs in rows {rows[name]} and {row}; ids must be unique, otherwise "
                "two instances share one weight"
            )
        rows[name] = row
    return rows


def save_weighting(
    directory: Path | str,
    weighting: Weighting,
    params: Mapping[str, Tensor],
    ids: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write ``weighting``, its ``params`` and the names of its rows into ``directory``.

    Args:
        directory: created if absent; each file is written under another name and then renamed.
        weighting: the configuration.
        params: its parameters.
        ids: names of the rows of a table (instances or domains); empty for a net.
        extra: anything JSON can hold that is needed to apply the weighting again, for example the
            names of an Instance Net's features.

    Raises:
        ValueError: a table whose number of rows is not the number of ids, or duplicate ids.
    """
    if not isinstance(weighting, InstanceNet) and len(ids) != weighting.size:
        raise ValueError(
            f"{type(weighting).__name__} has {weighting.size} rows but {len(ids)} ids were given"
        )
    row_index(ids)
    config = {
        "kind": type(weighting).__name__,
        "fields": {
            f.name: getattr(weighting, f.name) for f in fields(weighting) if f.name != "bound"
        },
        "bound": {"kind": type(weighting.bound).__name__, "fields": asdict(weighting.bound)},  # type: ignore[call-overload]
        "extra": dict(extra or {}),
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in params.items()}
    save_file(tensors, directory / "params.safetensors.tmp")
    os.replace(directory / "params.safetensors.tmp", directory / "params.safetensors")
    for name, content in (("config.json", config), ("ids.json", list(ids))):
        (directory / f"{name}.tmp").write_text(json.dumps(content, indent=1) + "\n")
        os.replace(directory / f"{name}.tmp", directory / name)


def load_weighting(
    directory: Path | str,
) -> tuple[Weighting, dict[str, Tensor], tuple[str, ...], dict[str, Any]]:
    """The ``(weighting, params, ids, extra)`` that ``save_weighting`` wrote into ``directory``.

    Nothing of the files is taken unchecked: they may be damaged, or of others.

    Raises:
        FileNotFoundError: a file is missing; the message names it.
        ValueError: a file that is not what ``save_weighting`` writes, an unknown kind, or
            parameters or ids that do not belong to the configuration; the message names the file.
    """
    directory = Path(directory)
    for name in _FILES:
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory / name}: not found; expected a directory written by save_weighting "
                f"({', '.join(_FILES)})"
            )
    config, ids = (_read_json(directory / name) for name in ("config.json", "ids.json"))
    path = directory / "params.safetensors"
    try:
        params = load_file(path)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    with _named(directory / "config.json"):
        bound = _make(_BOUNDS, config["bound"])
        if (config["fields"] or {}).get("layers", 0) > len(params):
            raise ValueError(f"more layers than {path.name} has parameters")
        weighting = _make(_WEIGHTINGS, config, bound=bound)
        with torch.device("meta"):  # a size that is wrong must not take memory
            expected = {name: tuple(tensor.shape) for name, tensor in weighting.init().items()}
        extra = dict(config["extra"])
    found = {name: tuple(tensor.shape) for name, tensor in params.items()}
    if expected != found:
        raise ValueError(f"{path}: expected parameters {expected}, found {found}")
    for name, tensor in params.items():
        if not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise ValueError(f"{path}: expected finite numbers, found others in {name!r}")
    with _named(directory / "ids.json"):
        rows = 0 if isinstance(weighting, InstanceNet) else weighting.size
        if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
            raise ValueError("expected a list of strings")
        if len(ids) != rows:
            raise ValueError(f"expected {rows} ids, as many as the weighting has rows")
        row_index(ids)
    return weighting, params, tuple(ids), extra


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Whatever is wrong with the content of a file becomes a ``ValueError`` that names it."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path}: expected a key {error}, found none") from error
    except (TypeError, AttributeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:400]}") from error


def _make(kinds: Mapping[str, type], config: Mapping[str, Any], **more: Bound) -> Any:
    kind = config["kind"]
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"unknown kind {str(kind)[:80]!r}; expected among {', '.join(kinds)}")
    default = {f.name: type(f.default) for f in fields(kinds[kind]) if f.default is not MISSING}
    for name, value in config["fields"].items():
        expected = default.get(name, int)  # what has no default is a count
        whole = isinstance(value, int) and not isinstance(value, bool)
        number = whole or (isinstance(value, float) and math.isfinite(value))
        if not (
            number if expected is float else whole if expected is int else type(value) is expected
        ):
            raise ValueError(f"{name}: expected {expected.__name__}, found {str(value)[:80]!r}")
    return kinds[kind](**config["fields"], **more)
