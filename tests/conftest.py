"""What every test starts from: one thread, a fixed seed."""

from __future__ import annotations

import signal

import pytest
import torch
from hypothesis import settings

from tests import shape_checks

shape_checks.install("bilevel", "weighting", "prm")

# How long an example takes depends on what else the machine does. The same code must get the same
# verdict every time: random search belongs to `make fuzz`, not to the suite.
settings.register_profile("values only", deadline=None, derandomize=True)
settings.load_profile("values only")

# Several threads split sums where they please; bit-for-bit comparisons of two code paths, in tests
# and in the fixtures that they share, need one order.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell starts background jobs so, and tests of Ctrl-C would wait for what never comes.
    signal.signal(signal.SIGINT, signal.default_int_handler)
