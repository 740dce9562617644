"""Malformed files: valid records of a format, changed in their values, their text, their bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st


class Raw(str):
    """JSON text that goes into the file as it is; what ``json.dumps`` would not write."""


TEXTS = (
    *("", " ", "+", "-", "+\n", "<image>", "<image>\n<image>", "\ud800", "\0", "\ufeff", "\u2028"),
    *("../x.png", "/etc/passwd", "a/../../x", "http://localhost:1/x.png", "x" * 300, "~"),
    *("Step 1: a\n\nStep 2: b", "### Question:\n", "### Solution Process:\n", "[Reasoning]", "```"),
    *(
        "### Question:\nq\n\n### Solution Process:\ns",
        "1. a\n2. b",
        "Answer: ",
        "\\boxed{",
        "{{x}}",
    ),
    *("true", "null", "0.5", "1e400", "nan", "-1", "__import__('os').abort()", "${HOME}", "%s"),
    *("*" * 20_000, " " * 20_000, "\n" * 20_000, "#" * 20_000, "(" * 20_000, "step 1 " * 3_000),
    *("<image> " * 3_000, "answer is " * 2_000, "1,234" * 4_000, "\\frac{" * 3_000, "a b" * 7_000),
)
"""Strings that say something to some format, and long ones that a pattern may choke on."""

RAW = (
    *("NaN", "-Infinity", "1e999", "-1e999", "1" * 5000, "1" * 400, "1e-400", "0x10", "01", "+1"),
    *("tru", "None", "'a'", '"a', '"\\ud83d"', '"\\u00"', "{", "]", ",", "", '{"a": 1, "a": 2}'),
    "[" * 500 + "]" * 500,
    "[" * 100_000,
    '{"a":' * 300 + "1" + "}" * 300,
)
"""Values as no JSON writer writes them."""

VALUES = st.one_of(
    st.sampled_from([None, True, False, 0, 1, 2, -1, 0.5, -0.5, 1e308, 10**30, [], {}, [[]]]),
    st.sampled_from(TEXTS),
    st.sampled_from(RAW).map(Raw),
    st.text(max_size=20),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=5,
    ),
).map(copy.deepcopy)  # sampled lists and dicts are changed later, and must stay as they are here
CHANGES = ("value", "value", "delete", "rename", "repeat", "wrap", "swap", "none")
BYTES = (b"\xff", b"\x00", b"\xed\xa0\x80", b"\xc0\xaf", b"\xef\xbb\xbf", b"\n", b"\r", b'"', b"}")


@st.composite
def changed(draw: st.DrawFn, records: Sequence[Any], most: int = 3) -> Any:
    """One of ``records`` with up to ``most`` places changed."""
    record = copy.deepcopy(draw(st.sampled_from(records)))
    for _ in range(draw(st.integers(1, most))):
        places = list(_places(record))
        if not places:
            return draw(VALUES)
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        _change(draw, record, holder, key)
    return record


def _places(value: Any) -> Any:
    """(container, key) of everything inside ``value``."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _change(draw: st.DrawFn, record: Any, holder: Any, key: Any) -> None:
    match draw(st.sampled_from(CHANGES)):
        case "delete":
            del holder[key]
        case "rename" if isinstance(holder, dict):
            holder[
                draw(st.sampled_from([key.upper(), key + "s", key[:-1], "text", "", "\ud800"]))
            ] = holder.pop(key)
        case "repeat" if isinstance(holder, list):
            holder.extend([holder[key]] * draw(st.sampled_from([1, 2, 200])))
        case "wrap":
            holder[key] = draw(st.sampled_from([[holder[key]], {"a": holder[key]}]))
        case "swap":
            places = list(_places(record))
            other, at = places[draw(st.integers(0, len(places) - 1))]
            holder[key] = copy.deepcopy(other[at])
        case "none":
            holder[key] = None
        case _:
            holder[key] = draw(VALUES)


def dumps(value: Any) -> str:
    """``value`` as JSON text, parts that are ``Raw`` as they are."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {dumps(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dumps, value)) + "]"
    return json.dumps(value)


@st.composite
def broken_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """``content``, cut, with bytes changed or put in, or in another encoding."""
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["cut", "put", "flip", "double", "utf-16", "empty"])):
            case "cut":
                content = content[:at]
            case "put":
                content = content[:at] + draw(st.sampled_from(BYTES)) + content[at:]
            case "flip" if at < len(content):
                bit = 1 << draw(st.integers(0, 7))
                content = content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]
            case "double":
                content = content + content[at:]
            case "utf-16":
                content = content.decode("utf-8", "replace").encode("utf-16")
            case "empty":
                content = b""
            case _:
                pass
    return content


@st.composite
def files(draw: st.DrawFn, records: Sequence[Any]) -> bytes:
    """A JSONL file or JSON array of a changed record, alone or behind a good one."""
    rows = [draw(changed(records))]
    if draw(st.booleans()):
        rows.insert(0, draw(st.sampled_from(records)))
    texts = list(map(dumps, rows))
    text = f"[{','.join(texts)}]" if draw(st.integers(0, 3)) == 0 else "\n".join(texts) + "\n"
    content = text.encode("utf-8", "surrogatepass")
    return draw(broken_bytes(content)) if draw(st.integers(0, 4)) == 0 else content
