"""Where the three libraries meet: commands, training runs, embedded data, reports."""

from __future__ import annotations


def __getattr__(name: str) -> str:
    """``__version__``: that of the installed package, looked up when it is asked for."""
    if name == "__version__":
        from recipes.run.provenance import PACKAGE, version_of

        return version_of(PACKAGE)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
