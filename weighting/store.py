"""Save and load a weighting: ``config.json`` + ``params.safetensors`` + ``ids.json``.

A table says nothing without the names of its rows, so they are saved together and checked together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from weighting.base import Params, Weighting
from weighting.bounds import Bound, Clip, LeakyReLU, Sigmoid, Softplus, Unbounded
from weighting.files import replacing, write_text
from weighting.instance_net import InstanceNet
from weighting.labels import StepLabels
from weighting.tables import DomainTable, InstanceTable

KINDS: tuple[type[Weighting], ...] = (InstanceTable, InstanceNet, DomainTable, StepLabels)
"""The weightings of this package."""

_FILES = ("config.json", "params.safetensors", "ids.json")
_BOUNDS: Mapping[str, type] = {
    c.__name__: c for c in (Clip, Sigmoid, Softplus, LeakyReLU, Unbounded)
}


def row_index(ids: Sequence[str]) -> dict[str, int]:
    """Row of every id, in the order given.

    Raises:
        ValueError: An id that occurs twice; the two instances would silently share one weight.
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
    params: Params,
    ids: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write ``weighting``, its ``params`` and the names of its rows into ``directory``.

    Args:
        directory: Created if absent; each file is either the old one or complete.
        weighting: The configuration.
        params: Its parameters.
        ids: Names of its rows (instances or domains); empty for a net.
        extra: Anything JSON can hold that is needed to apply the weighting again, for example the
            names of an Instance Net's features.

    Raises:
        ValueError: Not as many names as rows, or a name twice.
    """
    if len(ids) != weighting.size:
        raise ValueError(
            f"{type(weighting).__name__} has {weighting.size} rows but {len(ids)} ids were given"
        )
    row_index(ids)
    bound = weighting.bound
    config = {
        "kind": type(weighting).__name__,
        "fields": {
            f.name: getattr(weighting, f.name) for f in fields(weighting) if f.name != "bound"
        },
        "bound": {"kind": type(bound).__name__, "fields": asdict(bound)},
        "extra": dict(extra or {}),
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in params.items()}
    with replacing(directory / "params.safetensors") as temporary:
        save_file(tensors, temporary)
    for name, content in (("config.json", config), ("ids.json", list(ids))):
        write_text(directory / name, json.dumps(content, indent=1) + "\n")


def load_weighting(
    directory: Path | str, kinds: Sequence[type[Any]] = KINDS
) -> tuple[Weighting, dict[str, Tensor], tuple[str, ...], dict[str, Any]]:
    """Read what ``save_weighting`` wrote into ``directory``.

    Nothing in the files is taken unchecked: they may be damaged, or come from others.

    Args:
        directory: Holds the three files.
        kinds: Weightings that are known, by the names of their classes.

    Returns:
        Weighting, parameters, names of its rows, extra.

    Raises:
        FileNotFoundError: A file is missing; the message names it.
        ValueError: A file that is not what ``save_weighting`` writes, an unknown kind, or
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
        known = {kind.__name__: kind for kind in kinds}
        weighting: Weighting = _make(known, config, bound=bound)
        with torch.device("meta"):  # a size that is wrong must not take memory
            expected = {name: tuple(tensor.shape) for name, tensor in weighting.init().items()}
        extra = dict(config["extra"])
    shapes = {name: tuple(tensor.shape) for name, tensor in params.items()}
    if expected != shapes:
        raise ValueError(f"{path}: expected parameters {expected}, found {shapes}")
    for name, tensor in params.items():
        if not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise ValueError(f"{path}: expected finite numbers, found others in {name!r}")
    with _named(directory / "ids.json"):
        if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
            raise ValueError("expected a list of strings")
        if len(ids) != weighting.size:
            raise ValueError(f"expected {weighting.size} ids, as many as the weighting has rows")
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
