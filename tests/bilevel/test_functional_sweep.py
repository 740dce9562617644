"""Every operation on every route: exact, or declined with a sentence, and never wrong.

The outcomes make up ``docs/operations.md``. After a change of them, write it again::

    WRITE_OPERATIONS=1 .venv/bin/python -m pytest tests/bilevel/test_functional_sweep.py
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilevel import (
    CentralDifference,
    Ghost,
    Jvp,
    OneStep,
    PerExample,
    Reverse,
    Unrolled,
)
from tests.bilevel.comparing import relative
from tests.bilevel.operation_case import Case
from tests.bilevel.operations import EXAMPLES, OPERATIONS, Operation, draw

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"

# torch compiles some of its forward-mode formulas with its deprecated compiler.
pytestmark = pytest.mark.filterwarnings("ignore")

# Public names of torch.nn.functional without an entry of their own, and why.
ELSEWHERE = {
    "no operation": "Callable DType ScalingType SwizzleType Tensor assert_int_or_pair "
    "boolean_dispatch handle_torch_function has_torch_function has_torch_function_unary "
    "has_torch_function_variadic",
    "of 8-bit or grouped matrices on GPUs": "grouped_mm scaled_grouped_mm scaled_mm",
    "of integers": "one_hot",
    "another name of interpolate": "upsample upsample_bilinear upsample_nearest",
    "with two results, the first being the other's": "adaptive_max_pool1d_with_indices "
    "adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices max_pool1d_with_indices "
    "fractional_max_pool2d_with_indices fractional_max_pool3d_with_indices "
    "max_pool2d_with_indices max_pool3d_with_indices",
    "in the module MultiheadAttention": "multi_head_attention_forward",
}


def test_every_function_of_torch_is_in_the_sweep():
    covered = " ".join(operation.name for operation in OPERATIONS)
    covered = set(covered.replace(",", " ").replace(":", " ").split())
    covered |= set(" ".join(ELSEWHERE.values()).split())
    public = {
        name
        for name in dir(functional)
        if not name.startswith("_")
        and callable(getattr(functional, name))
        and getattr(getattr(functional, name), "__module__", "") != "typing"
    }
    assert public - covered == set()


COLUMNS = {
    "`Auto`": "auto",
    "`PerExample`, `Ghost`": "per example",
    "`Jvp`, one step": "jvp",
    "`Jvp`, several, solution": "jvp twice",
    "`Reverse`": "reverse",
    "`CentralDifference`": "differences",
}
EXACT, DECLINES, NONE = "exact", "declines", "no derivative in torch"


def outcomes(operation: Operation) -> dict[str, str]:
    """What each column's ways of computing make of the operation."""
    case = Case(operation)
    direction = {name: draw(*leaf.shape, 1)[..., 0] for name, leaf in case.lower.items()}
    first = second = None
    try:
        first = case.through_one_step()
        with sdpa_kernel(SDPBackend.MATH):
            second = (case.through_two_steps(), case.hessian_along(direction))
    except RuntimeError as error:
        if "derivative" not in str(error):
            raise
    found: dict[str, list[str]] = {column: [] for column in COLUMNS.values()}

    def compare(
        column: str, compute: Callable[[], Any], expected: Any, bound: float = 1e-9
    ) -> None:
        try:
            answer = compute()
        except (RuntimeError, ValueError, NotImplementedError) as error:
            if not re.search("choose|write a new tensor|leave the option out", str(error)):
                raise
            found[column].append(DECLINES)
            return
        assert relative(answer, expected) <= bound, (operation.name, column, answer, expected)
        found[column].append(EXACT)

    if first is None:
        return dict.fromkeys(found, NONE)
    bound = 1e-5  # of differences
    compare("auto", lambda: case.one_step(OneStep()), first)
    compare("per example", lambda: case.one_step(OneStep(PerExample())), first)
    upper_first = lambda route: case.one_step(OneStep(route, "upper-first"))  # noqa: E731
    if DECLINES not in found["per example"]:
        compare("per example", lambda: upper_first(Ghost()), case.through_one_step(0.0))
    compare("jvp", lambda: case.one_step(OneStep(Jvp())), first)
    compare("differences", lambda: case.one_step(OneStep(CentralDifference())), first, bound)
    if second is not None:
        compare("reverse", lambda: case.one_step(OneStep(Reverse())), first)
        compare("auto", lambda: case.one_step(OneStep(), case.scalar), first)
        compare("auto", lambda: case.two_steps(Unrolled()), second[0])
    if second is not None:
        for column, route, limit in (
            ("jvp twice", Jvp(), 1e-9),
            ("reverse", Reverse(), 1e-9),
            ("differences", CentralDifference(), bound),
        ):
            compare(column, lambda r=route: case.two_steps(Unrolled(product=r)), second[0], limit)
            compare(column, lambda r=route: case.product(r, direction), second[1], 10 * limit)
    return {
        column: NONE if not results else EXACT if DECLINES not in results else DECLINES
        for column, results in found.items()
    }


HEAD = """# Operations and routes

Which losses, layers and other operations of torch have which derivatives, measured by
`tests/bilevel/test_functional_sweep.py`, which also writes this page. Each was put into a small
model in float64, and the hypergradient on {examples} examples compared with double backward through
updates that are written out: through one step (`OneStep`) and two (`Unrolled`), and the products
with the Hessian that `Implicit` takes.

A route is **exact** if all of these agree to rounding (differences to 1e-5), and **declines** if it
says so by an error with a remedy. None of them is silently wrong. `Auto` is the default. Torch has
**no derivative** of some operations, first or second; then a route that needs one declines.

torch {torch}, on a CPU.
"""


def page(rows: Mapping[str, Mapping[str, str]]) -> str:
    """The page, from operation -> column -> outcome."""
    lines = [HEAD.format(torch=torch.__version__.partition("+")[0], examples=EXAMPLES)]
    kinds = {operation.name: operation.kind for operation in OPERATIONS}
    lines.append("## Exact on every route\n")
    for kind in dict.fromkeys(kinds.values()):
        names = [
            name for name, row in rows.items() if kinds[name] == kind and {*row.values()} == {EXACT}
        ]
        if names:
            lines.append(f"- {kind}: " + ", ".join(f"`{name}`" for name in names))
    lines.append("\n## The others\n")
    lines.append(f"| operation | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for name, row in rows.items():
        if {*row.values()} != {EXACT}:
            cells = " | ".join(row[column] for column in COLUMNS.values())
            lines.append(f"| `{name}` | {cells} |")
    return "\n".join(lines) + "\n"


def rows_of_page(text: str) -> dict[str, dict[str, str]]:
    """What the page says of each operation."""
    every, _, others = text.partition("## The others")
    rows = {}
    for line in every.partition("## Exact on every route")[2].splitlines():
        for name in re.findall("`([^`]+)`", line.partition(": ")[2]):
            rows[name] = dict.fromkeys(COLUMNS.values(), EXACT)
    for line in others.splitlines():
        if line.startswith("| `"):
            name, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
            rows[name.strip("`")] = dict(zip(COLUMNS.values(), cells, strict=True))
    return rows


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, str]]:
    """What the tests below have found, written at the end if that is asked for."""
    return {}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_an_operation_is_exact_or_declined_and_the_page_says_which(operation, measured):
    measured[operation.name] = outcomes(operation)
    if os.environ.get("WRITE_OPERATIONS") is None:
        said = rows_of_page(PAGE.read_text(encoding="utf-8"))
        assert measured[operation.name] == said.get(operation.name), "see the module's docstring"


def test_the_page_is_what_the_tests_write(measured):
    if os.environ.get("WRITE_OPERATIONS") is not None:
        assert list(measured) == [operation.name for operation in OPERATIONS]
        PAGE.write_text(page(measured), encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    rows = rows_of_page(text)
    in_order = {operation.name: rows[operation.name] for operation in OPERATIONS}
    assert len(rows) == len(OPERATIONS)
    assert page(in_order) == text
