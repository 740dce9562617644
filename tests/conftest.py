"""What every test starts from: one thread, a fixed seed."""

from __future__ import annotations

import pytest
import torch

# Several threads split sums where they please: bit-for-bit comparisons of two code paths need one.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _reproducible():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
