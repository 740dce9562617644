"""Write a safetensors file tensor by tensor, with its digest, and without a copy of them all.

``safetensors.torch.save_file`` holds the bytes of every tensor before it writes the first. The
bytes written here are the same: a header of JSON with the offsets, then the tensors, those of wide
types first and by name within a type. Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

# In the order in which safetensors puts them, which aligns every tensor.
_KINDS = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_RANKS = {dtype: rank for rank, dtype in enumerate(_KINDS)}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write named tensors, and return the SHA-256 of the file's bytes, in hexadecimal.

    Memory: that of one tensor, and only if it is on a device or not contiguous.

    Args:
        path: The file.
        tensors: Tensors by name, of dtypes that numpy or safetensors know.

    Raises:
        ValueError: A dtype that such a file cannot hold.
        OSError: The file cannot be written.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _RANKS:
            raise ValueError(
                f"{path}: {name!r} is of {tensor.dtype}, which a safetensors file cannot hold"
            )
    names = sorted(tensors, key=lambda name: (_RANKS[tensors[name].dtype], name))
    entries, offset = {}, 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _KINDS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(part: bytes | memoryview) -> None:
            digest.update(part)
            file.write(part)

        write(len(header).to_bytes(8, "little"))
        write(header)
        for name in names:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            write(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
