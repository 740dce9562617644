"""Measure, print the table and write the rows: ``recipes/evidence/gpu.sh``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from recipes.evidence.gpu.case import CAPS, CONTENDERS, POSITIONS, TILES, Case, cases
from recipes.evidence.gpu.measuring import Limits, NotReady, measure
from recipes.evidence.gpu.table import table
from recipes.evidence.gpu.targets import agreements, targets
from recipes.evidence.gpu.worker import command
from recipes.options.values import OptionError
from recipes.run.errors import reported
from recipes.run.files import check_writable, write_json


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what fits in the budget."""
    given = _parser().parse_args(arguments)
    output = Path(given.output)
    check_writable("--output", output)
    _check_device(given.device)
    words = sys.argv[1:] if arguments is None else arguments
    limits = Limits(given.budget, given.row_limit, given.start_limit)
    wanted = cases(given.tiles, given.positions, given.caps, given.contenders)
    results: dict[str, Any] = {}

    def write(about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        results.update(
            command=" ".join(["recipes/evidence/gpu.sh", *words]),
            size=given.size,
            limits=asdict(limits),
            **about,
            targets=[one.as_row() for one in targets(rows, given.size, about["card"])],
            agreement=agreements(rows),
            rows=[*rows],
        )
        write_json(output, results)
        print(f"{len(rows)} of {len(wanted)}: {_said(rows[-1])}", file=sys.stderr)

    try:
        measure(
            wanted,
            command(given.size, given.device, given.rounds, given.samples),
            limits,
            write,
        )
    except NotReady as error:
        raise OptionError(str(error)) from error
    print(table(results))


def _said(row: Mapping[str, Any]) -> str:
    one = Case(**{field.name: row[field.name] for field in fields(Case)})
    return f"{one}: {row['status']}"


def _check_device(name: str) -> None:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise OptionError(
            "--device cuda: this machine or this build of torch has none; "
            "--size tiny --device cpu tries the tool"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="recipes/evidence/gpu.sh", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--size", choices=["full", "published", "quarter", "tiny"], default="full")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiles", type=int, nargs="+", default=[*TILES])
    parser.add_argument("--positions", type=int, nargs="+", default=[*POSITIONS])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=[*CONTENDERS])
    parser.add_argument("--caps", type=float, nargs="*", default=[*CAPS], help="GB of 10⁹ bytes")
    parser.add_argument("--rounds", type=int, default=5, help="timed iterations of a step")
    parser.add_argument("--samples", type=int, default=12, help="hypergradients compared")
    parser.add_argument("--budget", type=float, default=530.0, help="seconds of all of it")
    parser.add_argument("--row-limit", type=float, default=30.0, help="seconds of a case")
    parser.add_argument("--start-limit", type=float, default=120.0, help="seconds to the first")
    parser.add_argument("--output", default="results/gpu.json")
    return parser


if __name__ == "__main__":
    sys.exit(reported("recipes.evidence.gpu", main))
