"""Order of data: epochs are permutations, batches may cross them, the seed decides."""

from __future__ import annotations

import pytest

from recipes.train.order import epoch_order


def test_every_epoch_is_a_permutation_whatever_the_batches():
    order = epoch_order(10, seed=1)
    whole = order(0, 40)
    for epoch in range(4):
        assert sorted(whole[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert whole[:10] != whole[10:20]
    assert [row for start in range(0, 40, 7) for row in order(start, 7)][:40] == whole


def test_same_seed_same_order():
    assert epoch_order(50, 3)(20, 60) == epoch_order(50, 3)(20, 60)
    assert epoch_order(50, 3)(0, 50) != epoch_order(50, 4)(0, 50)


def test_no_rows_is_an_error():
    with pytest.raises(ValueError, match="0 rows"):
        epoch_order(0, 0)
