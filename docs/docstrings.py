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
    in_table = False
    source = text.splitlines()
    for number, line in enumerate(source):
        if _RULE.match(line):
            ends = in_table and not any(map(_RULE.match, _block(source, number + 1)))
            if not in_table:
                lines += [_indent(line) + "```text"]
            lines.append(line)
            in_table = True
            if ends:
                lines.append(_indent(line) + "```")
                in_table = False
        else:
            # Examples in ``Args`` may have "::" too, but code does not end in it.
            lines.append(re.sub(r"::$", ":", line))
    return "\n".join(lines)


def _block(lines: list[str], start: int) -> list[str]:
    """Lines from ``start`` to the next blank one."""
    block: list[str] = []
    for line in lines[start:]:
        if not line.strip():
            break
        block.append(line)
    return block


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]
