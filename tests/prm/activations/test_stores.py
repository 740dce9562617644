"""What came first stays, up to a number of bytes."""

from __future__ import annotations

import torch

from prm.activations.stores import DiskStore, MemoryStore
from prm.tensor_cache import TensorCache

STATES = torch.arange(6.0).reshape(2, 3)


def test_memory_keeps_what_came_first_up_to_its_limit():
    store = MemoryStore(2 * STATES.nbytes)
    for key in "abcb":
        store.put(key, STATES)
    assert store.bytes == 2 * STATES.nbytes
    assert [store.get(key) is not None for key in "abc"] == [True, True, False]
    mutable = STATES.clone()
    store = MemoryStore(10**3)
    store.put("a", mutable)
    mutable.zero_()
    assert torch.equal(store.get("a"), STATES)


def test_a_folder_keeps_what_came_first_up_to_its_limit_and_knows_what_was_there(tmp_path):
    cache = TensorCache(tmp_path, "a" * 64)
    size = cache.put("a", {"states": STATES})
    store = DiskStore(cache, size + STATES.nbytes)
    store.put("b", STATES)
    store.put("c", STATES)
    assert [store.get(key) is not None for key in "abc"] == [True, True, False]
    assert store.bytes == cache.bytes == 2 * size
