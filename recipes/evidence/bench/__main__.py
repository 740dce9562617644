"""``python -m recipes.evidence.bench [core|embedded|race] ...``; core is the default."""

from __future__ import annotations

import sys

from recipes.run.errors import reported


def main() -> None:
    """Run the benchmark that the command line names."""
    arguments = sys.argv[1:]
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "core"
    if name == "embedded":
        from recipes.evidence.bench import embedded

        embedded.main(arguments)
    elif name == "race":
        from recipes.evidence.bench.race import measure

        measure.main(arguments)
    elif name == "core":
        from recipes.evidence.bench import core

        core.main(arguments)
    else:
        sys.exit(
            f"python -m recipes.evidence.bench: expected core, embedded or race, found {name!r}"
        )


if __name__ == "__main__":
    sys.exit(reported("recipes.evidence.bench", main))
