"""The same rows in every packing that is read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import zstandard
from pyarrow import ipc, parquet

ROWS = [
    {"id": f"r{n}", "question": "caf\u00e9?", "steps": [{"text": f"s {n}", "label": "+"}]}
    for n in range(300)
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
NUMBERED = list(enumerate(ROWS, start=1))
PACKED = {
    "gz": gzip.compress,
    "gz of two members": lambda data: gzip.compress(data[:999]) + gzip.compress(data[999:]),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor().compress,
    "zst of two frames": lambda data: b"".join(
        zstandard.ZstdCompressor().compress(part) for part in (data[:999], data[999:])
    ),
}
TEXTS = {
    "JSONL": LINES,
    "with a mark": b"\xef\xbb\xbf" + LINES,
    "one array": json.dumps(ROWS).encode(),
    "an indented array": json.dumps(ROWS, indent=2).encode(),
    "an array with a mark": b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).encode(),
    "indented objects": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
}


def table_file(path: Path, rows: list[dict], kind: str, schema=None) -> Path:
    table = pyarrow.Table.from_pylist(rows, schema=schema)
    if kind == "parquet":
        parquet.write_table(table, path, row_group_size=37)
    else:
        new = ipc.new_file if kind == "arrow file" else ipc.new_stream
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=37)
    return path
