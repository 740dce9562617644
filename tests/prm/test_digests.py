"""A digest beside a file: every changed bit is noticed, and ``sha256sum`` reads it."""

from __future__ import annotations

import hashlib

import pytest

from prm.data.stepwise_writer import read_weights
from prm.digests import check_digest, digest_path, write_digest
from prm.schema import DataError

LINES = b'{"id": "a", "weight": 0.5}\n{"id": "b", "weight": 1.25}\n'


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.jsonl"
    path.write_bytes(LINES)
    return path


def test_the_digest_has_the_form_of_sha256sum(weights):
    assert not check_digest(weights)
    write_digest(weights)
    assert check_digest(weights)
    expected = f"{hashlib.sha256(LINES).hexdigest()}  weights.jsonl\n"
    assert digest_path(weights).read_text() == expected


def test_every_flipped_bit_of_a_weights_file_is_noticed(weights):
    write_digest(weights)
    assert read_weights(weights) == {"a": 0.5, "b": 1.25}
    for place in range(8 * len(LINES)):
        flipped = bytearray(LINES)
        flipped[place // 8] ^= 1 << place % 8
        weights.write_bytes(flipped)
        with pytest.raises(DataError, match=r"changed after it was written, or is damaged"):
            read_weights(weights)


@pytest.mark.parametrize("content", [b"", b"\xff", b"0" * 64])
def test_a_damaged_digest_is_an_error_too(weights, content):
    digest_path(weights).write_bytes(content)
    with pytest.raises(DataError, match=r"weights.jsonl.sha256$"):
        read_weights(weights)
