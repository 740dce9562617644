"""What a chat template looks at in the texts that it lays out, found by rendering watched texts.

A template is a program, and could refuse a text, cut it, or choose other turns because of it. Most
look at nothing but roles. Where that is so, one rendering tells the layout of every conversation of
its length, and examples need not be rendered to be checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

_METHODS = frozenset(
    {"startswith", "endswith", "split", "rsplit", "replace", "strip", "lstrip", "rstrip"}
)
_LOSING = (nodes.Macro, nodes.CallBlock, nodes.AssignBlock, nodes.FilterBlock)
_DECIDING = (nodes.Assign, nodes.Test, nodes.Compare, nodes.Getitem)


class _Seen:
    """What was looked at: texts that were searched for, or anything else."""

    def __init__(self) -> None:
        self.constants: set[str] = set()
        self.else_seen = False

    def search(self, wanted: object, text: _Watched) -> None:
        """Note a search for ``wanted`` in a text."""
        if isinstance(wanted, str) and wanted and not text.joined:
            self.constants.add(str.__str__(wanted))
        else:
            self.else_seen = True


class _Watched(str):
    """A text that notes in ``seen`` what is looked at; its length, or a character, say.

    Outputs, tests for its type, white space cut off at its ends, and whether it is empty (no text
    of an example is) are not noted.
    """

    seen: _Seen
    joined: bool

    @staticmethod
    def of(text: str, seen: _Seen, *, joined: bool = False) -> _Watched:
        watched = _Watched(text)
        watched.seen, watched.joined = seen, joined
        return watched

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__") or name in _OWN or name in _METHODS:
            return object.__getattribute__(self, name)
        self.seen.else_seen = True
        return object.__getattribute__(self, name)

    def __bool__(self) -> bool:
        return True

    def __contains__(self, wanted: object) -> bool:
        self.seen.search(wanted, self)
        return str.__contains__(self, str(wanted))

    def __eq__(self, other: object) -> bool:
        self.seen.search(other, self)
        return str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__

    def startswith(self, *wanted: Any) -> bool:
        self.seen.search(wanted[0] if len(wanted) == 1 else None, self)
        return str.startswith(self, *wanted)

    def endswith(self, *wanted: Any) -> bool:
        self.seen.search(wanted[0] if len(wanted) == 1 else None, self)
        return str.endswith(self, *wanted)

    def split(self, *wanted: Any) -> list[Any]:
        self.seen.search(wanted[0] if wanted else None, self)
        return [self._like(part) for part in str.split(self, *wanted)]

    def rsplit(self, *wanted: Any) -> list[Any]:
        self.seen.search(wanted[0] if wanted else None, self)
        return [self._like(part) for part in str.rsplit(self, *wanted)]

    def replace(self, old: Any, new: Any, *count: Any) -> str:
        self.seen.search(old, self)
        return self._like(str.replace(self, old, new, *count))

    def strip(self, *characters: Any) -> str:
        return self._stripped(str.strip(self, *characters), *characters)

    def lstrip(self, *characters: Any) -> str:
        return self._stripped(str.lstrip(self, *characters), *characters)

    def rstrip(self, *characters: Any) -> str:
        return self._stripped(str.rstrip(self, *characters), *characters)

    def __add__(self, other: str) -> str:
        return _Watched.of(str.__add__(self, other), self.seen, joined=True)

    def __radd__(self, other: str) -> str:
        return _Watched.of(str.__add__(other, self), self.seen, joined=True)

    def __len__(self) -> int:
        self.seen.else_seen = True
        return str.__len__(self)

    def __getitem__(self, key: Any) -> str:
        self.seen.else_seen = True
        return str.__getitem__(self, key)

    def __iter__(self) -> Iterator[str]:
        self.seen.else_seen = True  # noted when it is stepped through, not by a test for iterables
        yield from str.__iter__(self)

    def __lt__(self, other: str) -> bool:
        self.seen.else_seen = True
        return str.__lt__(self, other)

    __le__ = __gt__ = __ge__ = __lt__

    def __mod__(self, other: Any) -> str:
        self.seen.else_seen = True
        return str.__mod__(self, other)

    def _like(self, text: str) -> _Watched:
        return _Watched.of(text, self.seen, joined=self.joined)

    def _stripped(self, text: str, characters: str | None = None) -> _Watched:
        self.seen.else_seen |= characters is not None and bool(characters.strip())
        return self._like(text)


_OWN = frozenset({"seen", "joined", "of", "_like", "_stripped"})


def looked_for(
    template: str, conversations: Sequence[list[dict[str, Any]]], values: Mapping[str, Any]
) -> frozenset[str] | None:
    """Return the texts that a template searches for in the content of turns.

    In a conversation of the same roles whose contents hold none of them more or less often, the
    template takes the same way.

    Args:
        template: The template.
        conversations: Conversations as the template gets them.
        values: What else it gets: the special tokens by name.

    Returns:
        The texts, or None if it looks at the contents in another way, or if that is not known.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: form
    seen = _Seen()
    try:
        if _loses_sight(environment.parse(template)):
            return None
        compiled = environment.from_string(template)
        for turns in conversations:
            compiled.render(
                messages=[_watch(turn, seen) for turn in turns],
                tools=None,
                documents=None,
                add_generation_prompt=False,
                **values,
            )
    except Exception:  # a template is a program, and fails like one
        return None
    return None if seen.else_seen else frozenset(seen.constants)


def _loses_sight(tree: nodes.Template) -> bool:
    """Return whether a text may be copied, unwatched, before it is looked at."""
    if next(tree.find_all(_LOSING), None) is not None:
        return True
    deciding = [*tree.find_all(_DECIDING), *(choice.test for choice in tree.find_all(nodes.If))]
    return any(
        isinstance(node, nodes.Concat) or next(node.find_all(nodes.Concat), None) is not None
        for node in deciding
    )


def _watch(turn: Mapping[str, Any], seen: _Seen) -> dict[str, Any]:
    content = turn["content"]
    if isinstance(content, str):
        watched: Any = _Watched.of(content, seen)
    else:
        watched = [
            part | {"text": _Watched.of(part["text"], seen)} if "text" in part else dict(part)
            for part in content
        ]
    return {**turn, "content": watched}


def _refuse(reason: str) -> None:
    raise TemplateError(reason)
