"""Batches of worker processes: the same, in order; errors as they were; crashes named."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading

import pytest
import torch
from torch.utils.data import DataLoader

from prm.batches.workers import ordered_map
from prm.schema import DataError
from prm.scoring import score_examples
from tests.prm.tiny import example, internvl, save_image


def test_the_same_in_order_whatever_the_workers():
    def make(number):
        return {"a": torch.arange(number), "b": [number, torch.get_num_threads() > 0], "c": "text"}

    expected = [make(number) for number in (5, 2, 9, 2)]
    for workers in (0, 1, 3):
        before = torch.get_rng_state()
        found = list(ordered_map(make, (5, 2, 9, 2), workers))
        assert torch.equal(torch.get_rng_state(), before)
        assert [row["b"] for row in found] == [row["b"] for row in expected]
        assert all(
            torch.equal(one["a"], two["a"]) for one, two in zip(found, expected, strict=True)
        )


def test_what_a_worker_does_stays_in_it():
    seen = []
    assert list(ordered_map(lambda number: seen.append(number) or len(seen), range(4), 2)) == [
        1, 1, 2, 2,
    ]  # fmt: skip
    assert seen == []


def all_ended():
    """Waits for the processes; those that were not told to go never end."""
    for process in multiprocessing.active_children():
        process.join()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_in_its_turn_as_it_was(workers):
    def make(number):
        if number == 2:
            raise DataError(expected="a", found="b", file="x.png", line=7)
        return number

    made = ordered_map(make, range(4), workers)
    assert [next(made), next(made)] == [0, 1]
    with pytest.raises(DataError) as caught:
        next(made)
    assert str(caught.value) == "x.png:7: expected a, found b"
    # While somebody holds the error, and with it the frame that raised it.
    all_ended()


def test_a_process_that_dies_is_named():
    def make(number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(
        DataError, match=r"loader processes, found .* (killed by signal|exited)"
    ) as e:
        list(ordered_map(make, range(3), 1))
    assert "fewer workers" in e.value.remedy
    all_ended()


def test_a_process_that_dies_while_the_others_are_started_is_named(monkeypatch):
    """torch says so from the signal handler, wherever the main process is by then."""

    def start(loader):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(DataLoader, "__iter__", start)
    with pytest.raises(DataError, match=r"loader processes, found .* killed by signal"):
        list(ordered_map(lambda number: number, range(3), 1))


def test_workers_leave_interrupts_to_the_main_process():
    def make(number):
        return signal.getsignal(signal.SIGINT) == signal.SIG_IGN

    assert list(ordered_map(make, range(2), 2)) == [True, True]
    assert signal.getsignal(signal.SIGINT) != signal.SIG_IGN


def test_nothing_is_left_behind(tmp_path):
    threads = threading.enumerate()

    def handles():
        # A queue's thread closes what is the queue's as its last act, when it gets to run.
        for thread in set(threading.enumerate()) - set(threads):
            thread.join()
        gc.collect()
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    list(ordered_map(lambda number: torch.ones(3), range(4), 2))
    before = handles()
    for _ in range(4):
        made = ordered_map(lambda number: torch.ones(3), range(40), 2)
        next(made)
        made.close()
        assert handles() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_scores_and_a_truncated_image(tmp_path, workers):
    prm = internvl()
    paths = [save_image(tmp_path / f"{n}.png", 56, 112 - 20 * n, n) for n in range(3)]
    collator = prm.collator(system_prompt=None)
    encoded = [collator.encode(example(images=(path,))) for path in paths]
    expected = score_examples(prm, {}, encoded, collator, 1)
    fresh = prm.collator(system_prompt=None)
    for row in encoded:
        fresh.encode(row.example)
    found = score_examples(prm, {}, encoded, fresh, 1, workers=workers)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    paths[1].write_bytes(paths[1].read_bytes()[:-300])
    third = prm.collator(system_prompt=None)
    for row in encoded:
        third.encode(row.example)
    with pytest.raises(DataError, match="truncated") as caught:
        score_examples(prm, {}, encoded, third, 1, workers=workers)
    assert caught.value.file == paths[1]
