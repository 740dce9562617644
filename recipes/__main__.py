"""The entry of ``bilevel-prm`` and ``python -m recipes``; it imports nothing that takes time."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from recipes.stopping import ending_at_once


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    The status is 0 for success, 1 for an error of the data or the run, 2 for wrong usage, and 130,
    143 or 129 after SIGINT, SIGTERM or SIGHUP, for which training saves its state. It does not
    depend on whether anybody reads what is printed. While modules are imported, a signal ends the
    process at once and without a word.
    """
    with ending_at_once():
        from recipes.command_line import run

        return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
