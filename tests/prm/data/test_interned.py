"""Numbered texts: a dict from text to number, in a few bytes each."""

from __future__ import annotations

import pickle
import random
import tracemalloc

import pytest

from prm.data.interned import Interned


def test_numbers_are_those_of_a_dict_that_counts():
    rng = random.Random(0)
    alphabet = ["", "a", "b", "ab", "é", "中", "\0", "\ud800", "a\0b"]
    texts = ["".join(rng.choices(alphabet, k=rng.randint(0, 4))) for _ in range(3_000)]
    expected: dict[str, int] = {}
    found = Interned()
    for text in texts:
        assert found.add(text) == expected.setdefault(text, len(expected))
    assert dict(found) == expected
    assert [found.text(number) for number in range(len(found))] == list(expected)
    assert len(found) == len(expected) < len(texts)
    copy = pickle.loads(pickle.dumps(found))
    assert dict(copy) == expected
    assert copy.add("new") == len(expected)


def test_texts_that_run_into_each_other_stay_apart():
    found = Interned(["ab", "c"])
    assert not any(text in found for text in ("abc", "bc", "b", ""))
    assert [found.add("a"), found.add("abc"), found.add("")] == [2, 3, 4]


@pytest.mark.parametrize("there", [(), ("a",)])
def test_what_is_not_there(there):
    found = Interned(there)
    assert found.get("x") is None
    assert found.get(3) is None
    assert 3 not in found
    with pytest.raises(KeyError, match="x"):
        found["x"]
    for number in (-1, len(there)):
        with pytest.raises(IndexError, match=f"expected a number from 0 .*found {number}"):
            found.text(number)


def test_a_hash_that_is_always_the_same_does_not_confuse_texts(monkeypatch):
    monkeypatch.setattr("prm.data.interned.hash", lambda raw: 7, raising=False)
    found = Interned(map(str, range(100)))
    assert [found[str(number)] for number in range(100)] == list(range(100))
    assert "100" not in found


def test_a_text_takes_a_few_bytes_beyond_its_own():
    tracemalloc.start()
    try:
        found = Interned(f"row-{number:07}" for number in range(50_000))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == 50_000
    assert held / len(found) < 11 + 25
