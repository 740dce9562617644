"""Groups of parameters with learning rates and weight decays of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from bilevel import tree
from bilevel.checks import require
from bilevel.optimizers.schedule import Schedule
from bilevel.tree import Tree

# One for all leaves, or one for each group by its name.
GroupRates: TypeAlias = float | Schedule | Mapping[str, float | Schedule]
GroupValues: TypeAlias = float | Mapping[str, float]

ONLY = ""  # the group of every leaf where there are no groups


def check_groups(
    owner: object,
    field: str,
    value: GroupRates | GroupValues,
    group: Callable[[str], str] | None,
) -> None:
    """Raise ValueError unless all values of a field are 0 or more, and groups exist if need be."""
    if not isinstance(value, Mapping):
        if not callable(value):
            require(owner, field, value)
        return
    if group is None:
        raise ValueError(
            f"{type(owner).__name__}: {field} has values for the groups {list(value)}, but there "
            "are no groups; give group, a function from a parameter's name to that of its group"
        )
    for name, number in value.items():
        if not callable(number):
            require(owner, f"{field}[{name!r}]", number)


def groups_of(params: Tree, size: int, group: Callable[[str], str] | None) -> Sequence[str]:
    """Return the group of each leaf, None leaves included."""
    if group is None:
        return [ONLY] * size
    return [group(name) for name in tree.names(params, none_is_leaf=True)]


def of_group(owner: object, field: str, values: GroupRates | GroupValues, group: str) -> Any:
    """Return a group's value of a field.

    Raises:
        ValueError: There are values for groups, but none for this one.
    """
    if not isinstance(values, Mapping):
        return values
    if group not in values:
        raise ValueError(
            f"{type(owner).__name__}: {field} has values for the groups {list(values)}, but group "
            f"puts parameters into {group!r}; add it"
        )
    return values[group]
