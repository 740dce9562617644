"""Cold start: which examples it draws."""

from __future__ import annotations

from dataclasses import replace

from recipes.options.parse import cold_start_options
from recipes.train.batches import epoch_order
from recipes.train.cold_start import cold_start_rows


def test_cold_start_draws_without_repetition():
    options = cold_start_options(train_file="t", output_dir="o", draw=4)
    assert cold_start_rows(options, 9) == epoch_order(9, 3)(0, 4)
    for draw in (0, 9, 100):
        assert sorted(cold_start_rows(replace(options, draw=draw), 9)) == list(range(9))
