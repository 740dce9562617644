"""Parts cover every entry once, and are views."""

from __future__ import annotations

import pytest
import torch

from bilevel.resident.memory import is_dense, owned, shared_leaves
from bilevel.resident.parts import parts


@pytest.mark.parametrize("entries", [1, 7, 30, 1000])
def test_every_entry_is_in_one_part(entries):
    shapes = [(), (3, 5), (40,), (2, 2, 2), (0,), (11, 3)]
    leaves = [torch.zeros(shape) for shape in shapes]
    leaves.append(torch.zeros(6, 4).t())
    for part in parts([leaves], entries):
        sizes = []
        for cut in part:
            view = cut.of(leaves)
            view += 1.0
            sizes.append(view.numel())
        assert sum(sizes) <= entries or len(part) == 1
    assert all(torch.equal(leaf, torch.ones_like(leaf)) for leaf in leaves)


def test_leaves_that_a_column_lacks_are_left_out():
    leaves = [torch.zeros(3), torch.zeros(4), torch.zeros(5)]
    grads = [torch.zeros(3), None, torch.zeros(5)]
    found = [cut.leaf for part in parts([leaves, grads]) for cut in part]
    assert found == [0, 2]


def test_memory_of_its_own():
    one = torch.arange(6.0)
    values = {"a": one, "b": one.view(2, 3), "c": torch.ones(()).expand(4), "d": torch.zeros(2)}
    found = owned(values)
    assert all(torch.equal(found[name], leaf) for name, leaf in values.items())
    assert found["a"] is one
    assert found["d"] is values["d"]
    found["b"].add_(1.0)
    found["c"][0] = 5.0
    assert torch.equal(one, torch.arange(6.0))
    assert float(found["c"][1]) == 1.0


def test_dense_is_one_stretch_of_memory():
    base = torch.zeros(4, 6)
    assert is_dense(base)
    assert is_dense(base.t())
    assert is_dense(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    assert not is_dense(base[:, :3])
    assert not is_dense(torch.zeros(1).expand(3))


def test_leaves_that_share_memory_are_found():
    one = torch.zeros(4)
    assert shared_leaves({"a": one, "b": torch.zeros(4)}) is None
    assert shared_leaves({"a": one, "b": one.view(2, 2)}) == ("a", "b")
    assert shared_leaves({"a": torch.zeros(1).expand(3)}) == ("a", "a")
