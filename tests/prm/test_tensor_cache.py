"""Entries are used where they are right: damage, other fingerprints and kills are survived."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prm.tensor_cache import TensorCache, fingerprint_of

STATES = torch.arange(6.0).reshape(2, 3)


def cache_at(folder: Path, fingerprint: str = "a" * 64) -> tuple[TensorCache, list[str]]:
    said: list[str] = []
    return TensorCache(folder, fingerprint, said.append), said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tensors_come_back_as_they_were(tmp_path, dtype):
    cache, said = cache_at(tmp_path)
    kept = {"x": STATES.to(dtype).T, "y": torch.tensor([True, False])}
    size = cache.put("k", kept)
    found = cache.get("k")
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], kept[name]) for name in kept)
    assert found["x"].dtype == dtype
    assert size == cache.bytes == (cache.place / "k.safetensors").stat().st_size
    assert cache.get("other") is None
    assert not said


@pytest.mark.parametrize("place", [4, 40, -1])
def test_a_changed_byte_is_noticed_wherever_it_is(tmp_path, place):
    cache, said = cache_at(tmp_path)
    cache.put("k", {"x": STATES})
    path = cache.place / "k.safetensors"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert cache.get("k") is None
    assert said[0].startswith(str(path))
    assert "computed again" in said[0]
    cache.put("k", {"x": STATES})
    assert torch.equal(cache.get("k")["x"], STATES)


@pytest.mark.parametrize("left", [0, 7, 100, -3])
def test_a_cut_file_is_noticed(tmp_path, left):
    cache, said = cache_at(tmp_path)
    cache.put("k", {"x": STATES})
    path = cache.place / "k.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    assert cache.get("k") is None
    assert "damaged" in said[0]


def test_another_fingerprint_has_entries_of_its_own(tmp_path):
    (first, _), (second, said) = cache_at(tmp_path), cache_at(tmp_path, "b" * 64)
    first.put("k", {"x": STATES})
    assert second.get("k") is None
    assert second.bytes == 0
    assert not said
    second.place.mkdir()
    os.replace(first.place / "k.safetensors", second.place / "k.safetensors")
    assert second.get("k") is None
    assert "for another model" in said[0]
    cache, said = cache_at(tmp_path, "b" * 64)
    cache.put("k", {"x": STATES})
    os.replace(cache.place / "k.safetensors", cache.place / "l.safetensors")
    assert cache.get("l") is None
    assert "for another model" in said[0]


KILLED = """
import os, signal, sys, torch, prm.tensor_cache
from pathlib import Path

def half(tensors, path, about):
    Path(path).write_bytes(b"x" * 50)
    os.kill(os.getpid(), signal.SIGKILL)

prm.tensor_cache.save_file = half
prm.tensor_cache.TensorCache(Path(sys.argv[1]), "a" * 64).put("k", {"x": torch.ones(2)})
"""


def test_a_process_that_is_killed_in_writing_leaves_nothing_that_is_read(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    cache, said = cache_at(tmp_path)
    assert list(cache.place.iterdir())  # what it left
    assert cache.get("k") is None
    assert cache.bytes == 0
    cache.put("k", {"x": STATES})
    assert torch.equal(cache.get("k")["x"], STATES)
    assert not said


def test_a_fingerprint_is_of_all_facts():
    facts = {"a": 1, "b": [1, 2]}
    assert fingerprint_of(facts) == fingerprint_of({"b": [1, 2], "a": 1})
    assert fingerprint_of(facts) != fingerprint_of({**facts, "a": 2})
