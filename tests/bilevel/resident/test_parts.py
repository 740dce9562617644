"""Parts cover every entry once, and are views."""

from __future__ import annotations

import pytest
import torch

from bilevel.resident.memory import is_dense, owned, shared_leaves
from bilevel.resident.parts import BLOCK, Cut, parts, reached


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


def embedding(*places, blocks=12):
    """A gradient that is not zero at these entries, counted in blocks."""
    leaf = torch.zeros(blocks * BLOCK, dtype=torch.float64)
    for place in places:
        leaf[int(place * BLOCK)] = -1e-300
    return leaf


@pytest.mark.parametrize(
    ("places", "found"),
    [
        ((), []),
        ((3.5, 6, 6.25), [3, 6]),
        ((11.999,), [11]),
        ((1, 2, 4), [1, 2, 4]),
        ((1, 2, 4, 5), None),  # most of it
        ((0,), None),  # as if it were dense
    ],
)
def test_stretches_that_a_gradient_reaches(places, found):
    """Of a cut that begins one block into a leaf."""
    leaf = torch.cat([torch.ones(BLOCK, dtype=torch.float64), embedding(*places)])
    cut = Cut(1, BLOCK, len(leaf))
    blocks = [(1 + block) * BLOCK for block in found or []]
    expected = [Cut(1, start, start + BLOCK) for start in blocks]
    assert reached(cut, [None, leaf]) == ([cut] if found is None else expected)


def test_not_a_number_is_reached_and_minus_zero_is_not():
    leaf = embedding()
    leaf[5 * BLOCK + 7] = float("nan")
    leaf[8 * BLOCK] = -0.0
    assert reached(Cut(0, 0, len(leaf)), [leaf]) == [Cut(0, 5 * BLOCK, 6 * BLOCK)]


def test_where_looking_would_not_pay_a_cut_is_reached():
    leaf = embedding()
    for cut in (Cut(0), Cut(0, 0, BLOCK + 1)):
        assert reached(cut, [leaf]) == [cut]
    meta = Cut(0, 0, BLOCK)
    assert reached(meta, [torch.zeros(BLOCK, device="meta")]) == [meta]


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
