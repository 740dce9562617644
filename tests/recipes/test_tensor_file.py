"""The bytes are those of safetensors' own writer, and no copy of the tensors is made."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipes.tensor_file import write_tensors
from tests.peak_bytes import peak_bytes

DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    *(torch.uint16, torch.uint32, torch.uint64),
]


def draw():
    named = {}
    for index, dtype in enumerate(DTYPES):
        named[f'state/{13 - index}/θ "{dtype}"'] = (100 * torch.rand(3, 4)).to(dtype)
        named[f"b/{index}"] = (100 * torch.rand(2)).to(dtype)
    return named | {"scalar": torch.tensor(3), "none": torch.zeros(0, 4), "x": torch.zeros(1, 1)}


def test_bytes_are_those_of_safetensors(tmp_path):
    named = draw()
    save_file(named, tmp_path / "theirs")
    digest = write_tensors(tmp_path / "ours", named)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert digest == hashlib.sha256((tmp_path / "theirs").read_bytes()).hexdigest()


def test_tensors_that_share_memory_or_are_not_contiguous(tmp_path):
    one = torch.arange(12.0).view(3, 4)
    named = {"a": one, "b": one, "turned": one.t(), "leaf": torch.ones(2, requires_grad=True)}
    write_tensors(tmp_path / "file", named)
    found = load_file(tmp_path / "file")
    assert all(torch.equal(found[name], tensor) for name, tensor in named.items())


def test_no_copy_is_made(tmp_path):
    named = {name: torch.rand(1000, 1000) for name in "abc"}
    assert peak_bytes(lambda: write_tensors(tmp_path / "file", named)) < 1000


def test_a_dtype_without_a_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'a' is of torch\.complex64"):
        write_tensors(tmp_path / "file", {"a": torch.zeros(2, dtype=torch.complex64)})
