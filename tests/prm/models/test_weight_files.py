"""Which files are the weights, and whether they are the ones that were written."""

from __future__ import annotations

import hashlib
import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from prm.models.convert import convert_internvl
from prm.models.model import load_prm, save_prm
from prm.models.untrusted import ModelError, listed
from prm.models.weight_files import DIGESTS, shard_names, tensor_shapes, weight_files, write_digests
from tests.prm.models.original_checkpoint import make_original, state_of, write_original
from tests.prm.tiny import qwen, qwen2_tokenizer


@pytest.fixture
def folder(tmp_path):
    save_prm(qwen(qwen2_tokenizer(), dtype=torch.float32), {}, tmp_path / "model")
    return tmp_path / "model"


def expected_digests(folder):
    names = sorted([*(path.name for path in folder.glob("*.safetensors")), "tokenizer.json"])
    return "".join(
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names
    )


def test_saved_and_converted_models_carry_the_sha256_of_weights_and_tokenizer(folder, tmp_path):
    assert (folder / DIGESTS).read_text() == expected_digests(folder)
    config, model, tokenizer = make_original("qwen2")
    source = write_original(tmp_path / "old", config, state_of(model), tokenizer, shards=2)
    convert_internvl(source, tmp_path / "new")
    assert (tmp_path / "new" / DIGESTS).read_text() == expected_digests(tmp_path / "new")
    assert len(expected_digests(tmp_path / "new").splitlines()) == 3
    load_prm(tmp_path / "new")


@pytest.mark.parametrize("bit", range(0, 32, 5))
def test_every_flipped_bit_of_a_weight_is_found(folder, bit):
    """Also low bits, which leave finite and likely values."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-400 + bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors: expected the file that was written"):
        load_prm(folder)
    (folder / DIGESTS).unlink()  # the remedy that the error names, for a change on purpose
    if bit < 23:  # of the mantissa
        load_prm(folder)


def test_weights_that_digests_do_not_name_are_refused(folder):
    state = load_file(folder / "model.safetensors")
    save_file(state, folder / "model-1.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ModelError, match=r"expected the digest of model-1\.safetensors, found none"
    ):
        load_prm(folder)
    write_digests(folder)
    load_prm(folder)


@pytest.mark.parametrize("line", ["", "x", "0" * 64 + " model.safetensors", "G" * 64 + "  a"])
def test_malformed_digests_are_refused_with_their_line(folder, line):
    path = folder / DIGESTS
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ModelError, match=r"model\.sha256, line 3: expected 64 hexadecimal digits"):
        load_prm(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors", "/x.safetensors", "a/x.safetensors", "..", "", ".", "x.bin", "a\\x.bin",
        "a\\x.safetensors", "C:x.safetensors", "..\\x.safetensors", "x\0.safetensors", 3, None, [],
    ],
)  # fmt: skip
def test_names_of_shards_stay_in_the_folder(tmp_path, name):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "b.safetensors", "c": name}}))
    with pytest.raises(ModelError, match=r"in the folder of the index, found"):
        shard_names(index)
    with pytest.raises(ModelError, match=r"in the folder of the index, found"):
        weight_files(tmp_path)


def test_shards_are_listed_once_and_sorted_and_headers_name_every_shape(tmp_path):
    save_file({"a": torch.ones(2, 3), "s": torch.ones(())}, tmp_path / "2.safetensors")
    save_file({"b": torch.ones(0, 4)}, tmp_path / "1.safetensors")
    where = {"a": "2.safetensors", "s": "2.safetensors", "b": "1.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    files = weight_files(tmp_path)
    assert [path.name for path in files] == ["1.safetensors", "2.safetensors"]
    assert tensor_shapes(files) == {"a": (2, 3), "s": (), "b": (0, 4)}


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(folder, kind):
    """A cast to float would load them without their scales: other scores, and no word."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("proj.weight"))
    tensors[name] = (tensors[name] * 100).to(kind)
    save_file(tensors, path, {"format": "pt"})
    (folder / DIGESTS).unlink()
    with pytest.raises(ModelError, match=rf"{name}: expected numbers in F64, F32, F16, BF16"):
        load_prm(folder)


def test_positions_in_a_checkpoint_are_no_weights(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"embeddings.position_ids": torch.arange(4), "w.weight": torch.ones(2)}, path)
    assert tensor_shapes([path]) == {"embeddings.position_ids": (4,), "w.weight": (2,)}


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_all_files_of_a_model_follow_the_umask(tmp_path, mask):
    old = os.umask(mask)
    try:
        save_prm(qwen(qwen2_tokenizer()), {}, tmp_path / "model")
        config, model, tokenizer = make_original("qwen2")
        source = write_original(tmp_path / "old", config, state_of(model), tokenizer)
        convert_internvl(source, tmp_path / "new")
    finally:
        os.umask(old)
    for folder in (tmp_path / "model", tmp_path / "new"):
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
        assert modes == dict.fromkeys(modes, 0o666 & ~mask)


def test_long_lists_are_shortened():
    assert listed(["a", "b"]) == "a, b"
    assert listed(list("abcdefg")) == "a, b, c, d, e and 2 more"
    assert listed([]) == "none"
