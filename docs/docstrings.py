"""An extension of griffe, which reads the sources for the API pages without importing them.

Docstrings are written for ``help()``. Two of their habits are made Markdown here: a literal block
after ``::``, and a table between lines of ``=====``. And where a package makes its ``__all__`` at
import time, the names that it imports for type checkers are taken for it.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_RULE = re.compile(r"^\s*=+(\s+=+)+\s*$")


class Readable(griffe.Extension):
    """See the module."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is not None and "```" not in obj.docstring.value:
            obj.docstring.value = markdown(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Give a package without a literal ``__all__`` the names of its own that it imports."""
        self.on_object(obj=pkg)
        if not pkg.exports:
            pkg.exports = [
                name
                for name, member in pkg.members.items()
                if member.is_alias
                and member.target_path.startswith(f"{pkg.name}.")
                and not name.startswith("_")
            ]


def markdown(text: str) -> str:
    """Return a docstring with its literal blocks and tables as Markdown has them."""
    lines: list[str] = []
    source = text.splitlines()
    while source:
        if _RULE.match(source[0]):
            size = _table_size(source)
            lines += _table(source[:size])
            del source[:size]
        else:
            # Examples in ``Args`` may have "::" too, but code does not end in it.
            lines.append(re.sub(r"::$", ":", source.pop(0)))
    return "\n".join(lines)


def _table_size(lines: list[str]) -> int:
    """Return how many lines a table has: to its last rule before a blank line."""
    size = 0
    for number, line in enumerate(lines):
        if not line.strip():
            break
        if _RULE.match(line):
            size = number + 1
    return size


def _table(lines: list[str]) -> list[str]:
    """Return a table as Markdown; a row whose first cell is empty continues the one before."""
    starts = [match.start() for match in re.finditer("=+", lines[0])]
    rules = [number for number, line in enumerate(lines) if _RULE.match(line)]
    rows: list[list[str]] = []
    for line in lines[1:]:
        if _RULE.match(line):
            continue
        cells = _cells(line, starts)
        if cells[0] or not rows:
            rows.append(cells)
        else:
            rows[-1] = [f"{old} {new}".strip() for old, new in zip(rows[-1], cells, strict=True)]
    if len(rules) == 2:  # a table without a header
        rows.insert(0, [""] * len(starts))
    rows.insert(1, ["---"] * len(starts))
    indent = _indent(lines[0])
    return ["", *(f"{indent}| {' | '.join(row)} |" for row in rows), ""]


def _cells(line: str, starts: list[int]) -> list[str]:
    """Return the cells of a line; a word that stands across a start belongs to the cell before."""
    at = [
        start if line[start - 1 : start].isspace() else max(start, line.find(" ", start))
        for start in starts[1:]
    ]
    return [
        line[start:end].strip() for start, end in zip([starts[0], *at], [*at, None], strict=True)
    ]


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]
