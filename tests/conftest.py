"""What every test starts from: one thread, a fixed seed."""

from __future__ import annotations

import signal
from pathlib import Path

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


SLOW = (
    *("tests/bilevel/audit/test_check.py", "tests/bilevel/test_internvl.py"),
    *("tests/bilevel/test_package.py", "tests/bilevel/test_precision.py"),
    *("tests/bilevel/test_replicas.py", "tests/bilevel/test_typing.py"),
    *("tests/bilevel/hypergradients/test_replay_memory.py",),
    *("tests/bilevel/hypergradients/test_unrolled.py",),
    *("tests/examples", "tests/fuzz", "tests/invariants"),
    *("tests/prm/batches/test_workers.py", "tests/prm/models/test_families.py"),
    *("tests/prm/test_package.py",),
    *("tests/recipes/data_files/test_validate.py", "tests/recipes/comparison/test_compare.py"),
    *("tests/recipes/embedded/test_pretrain.py", "tests/recipes/evidence"),
    *("tests/recipes/problems", "tests/recipes/run/test_checkpoints.py"),
    *("tests/recipes/run/test_faults.py", "tests/recipes/test_stopping.py"),
    *("tests/recipes/test_accelerator.py",),
    *("tests/recipes/test_cli.py", "tests/recipes/test_ranks.py"),
    *("tests/recipes/method/test_hypergradients.py",),
    *("tests/recipes/train/test_threads.py", "tests/recipes/train/test_training.py"),
    *("tests/recipes/train/test_workers.py",),
    *("tests/recipes/use", "tests/test_readme.py"),
)
"""Modules and folders that ``make test-quick`` leaves out: they have the marker ``slow``.

The others take about 75 processor seconds, so less than 90 seconds on two free cores. Look at
``pytest -m "not slow" --durations=20`` when that changes.
"""

_ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(items):
    """Mark the slow tests.

    Raises:
        pytest.UsageError: A listed module or folder does not exist.
    """
    slow = {(_ROOT / name).resolve() for name in SLOW}
    if missing := sorted(str(path) for path in slow if not path.exists()):
        raise pytest.UsageError(f"tests/conftest.py: SLOW lists what does not exist: {missing}")
    for item in items:
        if not slow.isdisjoint({item.path, *item.path.parents}):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell starts background jobs so, and tests of Ctrl-C would wait for what never comes.
    signal.signal(signal.SIGINT, signal.default_int_handler)
