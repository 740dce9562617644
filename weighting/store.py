"""Save and load weighting: ``config.json`` + ``params.safetensors`` + ``ids.json``.

An Instance Table is worth nothing without the ids of its rows, so they are saved together and
checked together.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from weighting.bounds import Bound, Clip, LeakyReLU, Sigmoid, Softplus, Unbounded
from weighting.instance_net import InstanceNet
from weighting.tables import DomainTable, InstanceTable

Weighting = InstanceTable | InstanceNet | DomainTable
_WEIGHTINGS: Mapping[str, type] = {c.__name__: c for c in (InstanceTable, InstanceNet, DomainTable)}
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

    Raises:
        FileNotFoundError: a file is missing; the message names it.
        ValueError: an unknown kind, or parameters that do not belong to the configuration.
    """
    directory = Path(directory)
    for name in ("config.json", "params.safetensors", "ids.json"):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory / name}: not found; expected a directory written by save_weighting "
                "(config.json, params.safetensors, ids.json)"
            )
    config = json.loads((directory / "config.json").read_text())
    bound = _make(_BOUNDS, config["bound"], directory)
    weighting = _make(_WEIGHTINGS, config, directory, bound=bound)
    params = load_file(directory / "params.safetensors")
    expected = {name: tuple(tensor.shape) for name, tensor in weighting.init().items()}
    found = {name: tuple(tensor.shape) for name, tensor in params.items()}
    if expected != found:
        raise ValueError(
            f"{directory / 'params.safetensors'}: expected parameters {expected}, found {found}"
        )
    return (
        weighting,
        params,
        tuple(json.loads((directory / "ids.json").read_text())),
        config["extra"],
    )


def _make(
    kinds: Mapping[str, type], config: Mapping[str, Any], directory: Path, **more: Bound
) -> Any:
    if config["kind"] not in kinds:
        raise ValueError(
            f"{directory / 'config.json'}: unknown kind {config['kind']!r}; "
            f"expected among {', '.join(kinds)}"
        )
    return kinds[config["kind"]](**config["fields"], **more)
