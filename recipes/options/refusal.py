"""From what the libraries refuse to what the user gave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from recipes.options.values import OptionError


@contextmanager
def blaming(flags: str) -> Iterator[None]:
    """Turn the ``ValueError`` of a constructor into an ``OptionError`` that names ``flags``.

    Args:
        flags: The options behind the constructor's arguments, as on the command line.

    Raises:
        OptionError: The body raised a ``ValueError``.
    """
    try:
        yield
    except OptionError:
        raise
    except ValueError as error:
        raise OptionError(f"{flags}: {error}") from error
