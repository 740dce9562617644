"""Malformed files by the thousand: the changes of ``strategies``, drawn by ``random`` from a seed.

Hypothesis looks for the smallest file that fails; this looks at many more of them.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

from tests.fuzz.strategies import BYTES, RAW, TEXTS, Raw, dumps

_PLAIN = (None, True, False, 0, 1, 2, -1, 0.5, -0.5, 1e308, 10**30, [], {}, [[]], "a", "4", "+")


def damaged_file(rng: random.Random, records: Sequence[Any]) -> bytes:
    """JSONL or an array of one or two of ``records``, changed."""
    rows = [changed(rng, rng.choice(records)) for _ in range(rng.choice((1, 1, 1, 2)))]
    texts = list(map(dumps, rows))
    text = f"[{','.join(texts)}]" if rng.random() < 0.25 else "\n".join(texts) + "\n"
    content = text.encode("utf-8", "surrogatepass")
    return damaged_bytes(rng, content) if rng.random() < 0.3 else content


def changed(rng: random.Random, record: Any) -> Any:
    """``record`` with one to three places changed."""
    record = copy.deepcopy(record)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(record))
        if not places:
            return value(rng)
        holder, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice((key.upper(), key + "s", key[:-1], "", "label"))] = holder.pop(key)
        elif kind == 2 and isinstance(holder, list):
            holder.extend([holder[key]] * rng.choice((1, 2, 50)))
        elif kind == 3:
            holder[key] = rng.choice(([holder[key]], {"a": holder[key]}, [holder[key]] * 2))
        elif kind == 4:
            other, at = rng.choice(places)
            holder[key] = copy.deepcopy(other[at])
        else:
            holder[key] = value(rng)
    return record


def value(rng: random.Random) -> Any:
    """Something that is probably not what belongs there."""
    kind = rng.randrange(10)
    if kind < 5:
        return copy.deepcopy(rng.choice(_PLAIN))
    if kind < 8:
        text = rng.choice(TEXTS)
        return text if len(text) < 500 or rng.random() < 0.1 else text[: rng.randrange(500)]
    if kind < 9:
        text = rng.choice(RAW)
        return Raw(text if len(text) < 6_000 or rng.random() < 0.1 else text[:400])
    return "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0x3000)))) for _ in range(9))


def damaged_bytes(rng: random.Random, content: bytes) -> bytes:
    """``content`` cut, or with bytes changed, put in or repeated."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randint(0, len(content))
        kind = rng.randrange(6)
        if kind == 0:
            content = content[:at]
        elif kind == 1:
            content = content[:at] + rng.choice(BYTES) + content[at:]
        elif kind == 2:
            content = content[:at] + rng.randbytes(rng.randint(1, 8)) + content[at + 4 :]
        elif kind == 3:
            content = content[:at] + content[max(0, at - rng.randint(1, 40)) :]
        elif at < len(content):
            content = (
                content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
            )
    return content


def _places(holder: Any) -> Any:
    if isinstance(holder, dict | list):
        for key in holder if isinstance(holder, dict) else range(len(holder)):
            yield holder, key
            yield from _places(holder[key])
