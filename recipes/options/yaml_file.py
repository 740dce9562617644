"""Read the YAML of presets and of ``args.yaml``: plain files of ``option: value``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from recipes.options.values import OptionError

_LARGEST = 2**20
_MISTAKES = (
    yaml.YAMLError,
    ValueError,  # malformed dates and numbers, and bytes that are not UTF-8
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    RecursionError,
)
"""Errors that PyYAML raises for a malformed file, among them errors of Python itself."""


class _PlainLoader(yaml.SafeLoader):
    """Build plain values only, without aliases, which can expand ten lines to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem=f"alias *{event.anchor}: write the value out", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        mapping = super().construct_mapping(node, deep)
        if isinstance(node, yaml.MappingNode) and len(mapping) < len(node.value):
            raise yaml.MarkedYAMLError(
                problem="a key that is there twice", problem_mark=node.start_mark
            )
        return mapping


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the keys and values of a file; an empty file has none.

    Raises:
        OptionError: The file cannot be read, is not YAML, is larger than 1 MiB, has aliases or a
            key twice, or holds anything but keys and values.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST + 1)
    except OSError as error:
        raise OptionError(f"{path}: cannot be read ({error.strerror})") from error
    if len(raw) > _LARGEST:
        raise OptionError(f"{path}: expected a file of options, found more than {_LARGEST:,} bytes")
    try:
        content = yaml.load(raw.decode(), _PlainLoader)
    except _MISTAKES as error:
        reason = " ".join(str(error).split())
        raise OptionError(f"{path}: not valid YAML: {reason[:400]}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise OptionError(f"{path}: expected `option: value` lines, found {type(content).__name__}")
    return {str(key): value for key, value in content.items()}
