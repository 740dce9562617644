"""Shapes that functions state in their annotations, checked at every call while the tests run.

``jaxtyping.install_import_hook`` does so for every function, inner ones included, and takes three
times as long as the tests themselves. Here only functions and methods of modules are checked, and
only those with a shape among their annotations.
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import FunctionType, ModuleType
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, jaxtyped

# An int passes for a float, as for mypy.
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def install(*packages: str) -> None:
    """Check the shapes that modules of these packages state, from their import on."""
    sys.meta_path.insert(0, _Finder(packages))


def check_module(module: ModuleType) -> None:
    """Replace the functions and methods of a module that state shapes by ones that are checked.

    Constructors are left alone: they say in their own words what they refuse.
    """
    for owner in (module, *_classes(module)):
        for name, member in list(vars(owner).items()):
            wrap = type(member) if isinstance(member, staticmethod | classmethod) else None
            function = member if wrap is None else member.__func__
            if not isinstance(function, FunctionType) or name == "__init__":
                continue
            if function.__module__ != module.__name__:  # imported
                continue
            hints = typing.get_type_hints(function)
            if any(map(_is_shape, hints.values())):
                # Another decorator (`torch.no_grad`) hides the module in which the names mean this.
                inspect.unwrap(function).__annotations__ = hints
                checked = jaxtyped(function, typechecker=_beartype)
                setattr(owner, name, checked if wrap is None else wrap(checked))


def _classes(module: ModuleType) -> list[type]:
    return [value for value in vars(module).values() if isinstance(value, type)]


def _is_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(_is_shape(part) for part in typing.get_args(hint))


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        check_module(module)


class _Finder(MetaPathFinder):
    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = packages

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self._packages:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec
