"""Names of the parts of a step in a profile of torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from torch.profiler import record_function

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

PARTS = ("lower pass", "lower update", "upper gradient", "mixed product", "upper step")
"""What a profile (``torch.profiler.profile``) calls the parts of a step.

A small window in one graph (``bilevel.hypergradients.one_graph``) is a part of its own.
"""


def part(name: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Return a decorator that gives the time of a function its name in a profile.

    Outside a profile a call takes a few microseconds more. A part within another of the same name
    is counted in both.

    Args:
        name: One of ``PARTS``.
    """

    def named(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            with record_function(name):
                return function(*args, **kwargs)

        return call

    return named
