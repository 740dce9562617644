"""Counts and peaks of calls whose operations are known."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.profiler import profile

from recipes.evidence.gpu.meter import Counts, CpuMeter, count_events

GB = 10**9


def test_operations_that_compute_are_counted_and_views_are_not():
    x = torch.ones(10, 10)

    def run():
        y = (x * 2.0).t()  # a product, and a view
        y = y.reshape(-1)[3:]  # the copy of what is turned, and a view
        y.add_(1.0).exp_()  # two more
        assert x.detach().sum().item() == 100.0  # a sum, and a read
        torch.empty(5).fill_(1.0)  # a fill

    assert CpuMeter().counted(run) == Counts(launches=4, copies=2, reads=1, waits=1)


def test_operations_of_a_backward_pass_are_counted_as_the_profiler_does():
    x = torch.ones(10, 10, requires_grad=True)

    def run():
        x.grad = None
        (x * 2.0).t().exp().sum().sqrt().backward()
        assert float(x.grad[0, 0]) > 0.0

    found = CpuMeter().counted(run)
    with profile() as recorded:
        run()
    names = [event.name for event in recorded.function_events]
    computing = ("mul", "exp", "sum", "sqrt", "div", "add_", "pow")
    assert found.launches == sum(names.count(f"aten::{name}") for name in computing)
    assert found.reads == found.waits == names.count("aten::_local_scalar_dense") == 1


def test_events_of_a_profile():
    names = ["cudaLaunchKernel"] * 3 + ["cuLaunchKernelEx", "cudaLaunchKernelExC"]
    names += ["void at::native::vectorized_elementwise_kernel", "aten::mul", "cudaEventRecord"]
    names += ["cudaMemcpyAsync", "cudaMemcpyAsync", "cudaMemsetAsync", "cudaStreamSynchronize"]
    names += ["Memcpy DtoH (Device -> Pageable)", "Memcpy HtoD (Pageable -> Device)"]
    names += ["cudaDeviceSynchronize", "cudaStreamWaitEvent", "Memset (Device)"]
    assert count_events(names) == Counts(launches=5, copies=3, reads=1, waits=2)
    assert count_events([]) == Counts(0, 0, 0, 0)


def test_the_peak_is_what_is_held_and_what_a_call_allocates():
    def run():
        first = torch.zeros(1000)
        del first
        return torch.zeros(250)

    assert CpuMeter().peak(run, held=500) == (500 + 4000, None)


@pytest.mark.parametrize(("cap", "fits"), [(4500, True), (4499, False)])
def test_a_cap_holds_what_the_peak_is(cap, fits):
    assert CpuMeter().fits(lambda: torch.zeros(1000), 500, cap / GB) is fits


def test_seconds_are_the_median_of_calls():
    calls = []
    seconds, events = CpuMeter().seconds(lambda: calls.append(1), 5)
    assert len(calls) == 5
    assert 0.0 <= seconds < 60.0
    assert events is None
